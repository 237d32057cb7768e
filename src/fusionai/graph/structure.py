"""What a graph computes, apart from names. Values with equal digests are computed alike from the same tensors.

A digest covers the operator, its arguments, and the digests of the values that it takes. Dropout that does nothing
passes its input's digest on, and the two spellings of plain attention count as one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from fusionai.graph.inference import draws, in_inference, written_values
from fusionai.graph.model import Argument, Atom, Node, OpDag, Ref, TensorType, ValueName
from fusionai.graph.vocabulary import operator

_DROPOUT = frozenset({"aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"})
_SDPA = "aten.scaled_dot_product_attention.default"
_ATTENTION = "fusion.attention"


@dataclass(frozen=True, slots=True)
class Structure:
    """Digests of what a graph computes."""

    values: Mapping[ValueName, bytes]
    """By value; inputs and weights included."""
    loss: bytes
    writes: frozenset[tuple[bytes, bytes]]
    """Each write to a buffer: what was there, and the operator that writes."""

    def computes(self, other: Structure) -> bool:
        """Return whether both graphs compute the same loss and write the same to the same buffers."""
        return (self.loss, self.writes) == (other.loss, other.writes)


def structure(graph: OpDag, *, inference: bool) -> Structure:
    """Return the digests of a graph as it stands, or of its form in inference mode."""
    types = dict(graph.types)
    types |= {item.name: item.type for item in graph.inputs}
    types |= {weight.name: weight.type for weight in graph.weights}
    values = {item.name: _digest("input", item.name) for item in graph.inputs}
    values |= {weight.name: _digest("weight", weight.key) for weight in graph.weights}
    drawn: Counter[bytes] = Counter()
    writes = set()
    for node in graph.nodes:
        run = in_inference(node) if inference else node
        if run is None:
            # A later operator may read what was written, and then misses it.
            values.update((output, _digest("not written", output)) for output in node.outputs)
            continue
        source = _passed_on(run)
        if source is not None:
            values[run.outputs[0]] = values[source]
            continue
        found = _digest(*_form(run, values, types))
        if draws(run):
            # Two draws are two values, though nothing but their order tells them apart.
            drawn[found] += 1
            found = _digest(found, drawn[found])
        values.update((output, _digest(found, number)) for number, output in enumerate(run.outputs))
        writes |= {(values[name], found) for name in written_values(run)}
    return Structure(values, values[graph.loss], frozenset(writes))


def _passed_on(node: Node) -> ValueName | None:
    """Return the value that dropout passes on unchanged, or None."""
    if node.op not in _DROPOUT:
        return None
    bound = operator(node.op).bind(node)
    source = bound["input"]
    return source.name if isinstance(source, Ref) and (bound["train"] is False or bound["p"] == 0) else None


def _form(node: Node, values: Mapping[ValueName, bytes], types: Mapping[ValueName, TensorType]) -> tuple[Hashable, ...]:
    """Return an operator call with digests in place of names, defaults filled in."""
    bound = operator(node.op).bind(node)
    plain = _plain_attention(node, bound, types)
    if plain is not None:
        bound = plain
    elif node.op == _ATTENTION:
        del bound["layer"]  # a number that only tells attentions apart

    def atom(value: Atom) -> Hashable:
        # Python calls 1, 1.0 and True equal, but operators treat them differently.
        return values[value.name] if isinstance(value, Ref) else (type(value).__name__, repr(value))

    def argument(value: Argument) -> Hashable:
        return tuple(atom(each) for each in value) if isinstance(value, tuple) else atom(value)

    name = node.op if plain is None else "attention"
    return (name, *((parameter, argument(value)) for parameter, value in bound.items()))


def _plain_attention(
    node: Node, bound: Mapping[str, Argument], types: Mapping[ValueName, TensorType]
) -> dict[str, Argument] | None:
    """Return the arguments of attention without mask, window, softcap and dropout, or None for anything else.

    A model of transformers is captured with torch's operator where it drops attention weights out, else with ours.
    """
    if node.op == _ATTENTION:
        if bound["window"] or bound["softcap"]:
            return None
        causal, scale = bound["causal"], bound["scale"]
    elif node.op == _SDPA:
        query, key = (
            types[each.name].shape if isinstance(each, Ref) else () for each in (bound["query"], bound["key"])
        )
        if bound["attn_mask"] is not None or bound["dropout_p"] or len(query) != 4 or len(key) != 4:
            return None
        if query[1] != key[1] and not bound["enable_gqa"]:
            return None
        causal, scale = bound["is_causal"], bound["scale"]
        if scale is None and isinstance(query[3], int):
            scale = query[3] ** -0.5
    else:
        return None
    if not isinstance(scale, int | float):
        return None
    return {
        "query": bound["query"],
        "key": bound["key"],
        "value": bound["value"],
        "scale": float(scale),
        "causal": bool(causal),
    }


def _digest(*parts: Hashable) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
