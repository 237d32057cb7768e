"""Turns a finished listing into an OP-DAG with canonical names.

Names depend on nothing but the operators and their order, so a model traced whole and one whose blocks were
instantiated give equal graphs, and equal models one content hash.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fusionai.errors import GraphError
from fusionai.graph.capture.inputs import ExampleInput
from fusionai.graph.capture.listing import Listing, node_reads, rewrite_values
from fusionai.graph.capture.state import ModuleState, value_name
from fusionai.graph.evaluation_places import placed
from fusionai.graph.model import EvaluationGraph, Input, Node, OpDag, TensorType, ValueName, Weight, WeightKey
from fusionai.graph.vocabulary import VOCABULARY, VOCABULARY_VERSION, operator

ATTENTION = "fusion.attention"
ATTENTION_LAYER = 3
"""Position of the argument that tells one attention of a model from the others."""


def check_operators(listing: Listing) -> None:
    """Raise GraphError naming each operator that the vocabulary lacks, with the modules that use it."""
    unknown: dict[str, Node] = {}
    for each in listing.nodes:
        if each.op not in VOCABULARY:
            unknown.setdefault(each.op, each)
    if not unknown:
        return
    name, node = next(iter(unknown.items()))
    others = sorted(unknown.keys() - {name})
    more = f" (and also {', '.join(others)})" if others else ""
    try:
        operator(name)
    except GraphError as error:
        place = f"module {node.scope!r}" if node.scope else "the model itself"
        raise GraphError(f"{place} uses an operator that FusionAI does not have{more}: {error}") from None


def assemble(
    name: str,
    listing: Listing,
    inputs: Sequence[ExampleInput],
    state: ModuleState,
    evaluation: Listing | None = None,
) -> OpDag:
    """Return the OP-DAG of a listing: only used values, canonical names, attentions numbered in order.

    With `evaluation`, the listing of the module in evaluation mode, the OP-DAG has an evaluation graph.
    """
    if evaluation is not None and evaluation.symbols != listing.symbols:
        raise GraphError(
            "the sizes that may change are others in evaluation than in training; leave axes out of dynamic={...}"
        )
    listings = [listing] if evaluation is None else [listing, evaluation]
    reads = [{each for node in part.nodes for each in node_reads(node)} for part in listings]
    weights = _weights(listings, state, set().union(*reads))
    definers = {source for source, _ in listing.symbols.values()}
    kept = [item for item in inputs if item.name in definers.union(*reads)]
    names = {ValueName(item.name): ValueName(item.name) for item in kept}
    names |= _weight_names(weights, set(names))
    parts = [_named(part, names) for part in listings]
    known = [
        Weight(names[each.name], each.key, each.type, each.kind, each.trainable, each.aliases)
        for each in weights
        if each.name in reads[0]
    ]
    graph = OpDag(
        vocabulary=VOCABULARY_VERSION,
        name=name,
        symbols=listing.symbols,
        inputs=tuple(
            Input(ValueName(item.name), listing.types[ValueName(item.name)], item.role, item.private) for item in kept
        ),
        weights=tuple(known),
        nodes=parts[0].nodes,
        types=parts[0].types,
        loss=parts[0].loss,
    )
    if evaluation is None:
        return graph
    further = tuple(
        # No gradient reaches it, and as in torch no optimizer changes it.
        Weight(names[each.name], each.key, each.type, each.kind, False, each.aliases)
        for each in weights
        if each.name not in reads[0]
    )
    own = EvaluationGraph(further, parts[1].nodes, (0,) * len(parts[1].nodes), parts[1].types, parts[1].loss)
    return msgspec.structs.replace(graph, evaluation=placed(graph, own))


@dataclass(frozen=True, slots=True)
class _Part:
    """The operators of one listing with canonical names."""

    nodes: tuple[Node, ...]
    types: dict[ValueName, TensorType]
    loss: ValueName


def _named(listing: Listing, outside: Mapping[ValueName, ValueName]) -> _Part:
    """Return a listing's operators with canonical names; `outside` are the names of inputs and weights."""
    names = dict(outside)
    taken = set(names.values())
    nodes, attentions = [], 0
    counts: Counter[str] = Counter()
    for node in listing.nodes:
        base = re.sub(r"\W", "_", node.op.split(".")[1]).strip("_")
        own = f"{base}_{counts[base]}"
        while own in taken:
            counts[base] += 1
            own = f"{base}_{counts[base]}"
        counts[base] += 1
        for index, output in enumerate(node.outputs):
            names[output] = ValueName(own if index == 0 else f"{own}_out{index}")
        taken.update(names[output] for output in node.outputs)
        moved = rewrite_values(node, names.__getitem__)
        args = moved.args
        if node.op == ATTENTION:
            args = (*args[:ATTENTION_LAYER], attentions, *args[ATTENTION_LAYER + 1 :])
            attentions += 1
        outputs = tuple(names[output] for output in node.outputs)
        nodes.append(Node(own, node.op, args, moved.kwargs, outputs, node.scope))
    types = {names[output]: listing.types[output] for node in listing.nodes for output in node.outputs}
    return _Part(tuple(nodes), types, names[listing.loss])


def _weights(listings: Sequence[Listing], state: ModuleState, read: set[ValueName]) -> list[Weight]:
    rank = state.rank()
    mutated = set[WeightKey]().union(*(listing.mutated for listing in listings))
    return [
        state.weight(key, mutated=key in mutated)
        for key in sorted(state.entries, key=rank.__getitem__)
        if value_name(key) in read
    ]


def _weight_names(weights: Sequence[Weight], taken: set[ValueName]) -> dict[ValueName, ValueName]:
    names: dict[ValueName, ValueName] = {}
    used = set(taken)
    for weight in weights:
        base = name = "w_" + re.sub(r"\W", "_", weight.key)
        number = 1
        while name in used:
            number += 1
            name = f"{base}_{number}"
        used.add(ValueName(name))
        names[weight.name] = ValueName(name)
    return names
