"""Exact simplifications of a traced graph: they remove operators that change no value and no gradient."""

from __future__ import annotations

from collections.abc import Iterator

from fusionai.graph.capture.buffer_updates import writes_in_place
from fusionai.graph.capture.listing import Listing, node_reads, rewrite_values
from fusionai.graph.capture.state import ModuleState, value_name
from fusionai.graph.model import Argument, Keyword, Node, Ref, Size, TensorType, ValueName

_CASTS = frozenset({"aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten.type_as.default"})
_SAME = frozenset(
    {"aten.alias.default", "aten.lift_fresh.default", "aten.lift_fresh_copy.default", "aten.positive.default"}
)
_RESHAPES = frozenset({"aten.view.default", "aten.reshape.default", "aten.expand.default", "aten.flatten.using_ints"})
_BROADCAST = "aten.broadcast_tensors.default"
_TO_THE_END = (1 << 63) - 1
"""The number that torch uses as the end of a slice without an end."""

_FULL_IN_FULL_OUT = frozenset(
    {
        "_grouped_mm.default",
        "add.Scalar",
        "add.Tensor",
        "cat.default",
        "chunk.default",
        "clone.default",
        "contiguous.default",
        "cos.default",
        "detach.default",
        "div.Scalar",
        "div.Tensor",
        "dropout.default",
        "embedding.default",
        "expand.default",
        "gelu.default",
        "index.Tensor",
        "mean.default",
        "mean.dim",
        "mul.Scalar",
        "mul.Tensor",
        "neg.default",
        "permute.default",
        "pow.Tensor_Scalar",
        "relu.default",
        "reshape.default",
        "rsqrt.default",
        "rsub.Scalar",
        "select.int",
        "sigmoid.default",
        "silu.default",
        "sin.default",
        "slice.Tensor",
        "split.Tensor",
        "sqrt.default",
        "squeeze.dim",
        "stack.default",
        "sub.Scalar",
        "sub.Tensor",
        "sum.dim_IntList",
        "tanh.default",
        "transpose.int",
        "unsqueeze.default",
        "view.default",
    }
)
"""Operators (aten) that autocast never runs in bf16, and whose result is float32 when any of their tensors is."""


def normalise(listing: Listing) -> None:
    """Replace, in place, operators that have several spellings in torch by one of them."""
    nodes: list[Node] = []
    for node in listing.nodes:
        if node.op == _BROADCAST:
            nodes += _expansions(node, listing.types)
        else:
            nodes.append(_plain_cast(node, listing.types))
    listing.nodes = nodes


def _expansions(node: Node, types: dict[ValueName, TensorType]) -> Iterator[Node]:
    for source, output in zip(node_reads(node), node.outputs, strict=True):
        shape = tuple(size if isinstance(size, int) else Size(size) for size in types[output].shape)
        yield Node(output, "aten.expand.default", (Ref(source), shape), {}, (output,), node.scope)


def simplify(listing: Listing, state: ModuleState) -> None:
    """Remove, in place, operators that do nothing, then operators whose outputs nothing reads."""
    replaced: dict[ValueName, ValueName] = {}
    full = _given_in_full(listing)
    varying = {value_name(key) for key, entry in state.entries.items() if entry.kind == "parameter"}
    kept = []
    for node in listing.nodes:
        node = rewrite_values(node, lambda name: replaced.get(name, name))
        source = _unchanged(node, listing.types, full, varying)
        if source is not None:
            replaced[node.outputs[0]] = source
            continue
        kept.append(node)
        reads = list(node_reads(node))
        if any(name in varying for name in reads) and node.op != "aten.detach.default":
            varying.update(node.outputs)
        if _stays_full(node, listing.types, full, reads):
            full.update(node.outputs)
    listing.nodes = kept
    listing.loss = replaced.get(listing.loss, listing.loss)
    remove_dead(listing)


def remove_dead(listing: Listing) -> None:
    """Remove operators whose outputs nothing reads, except those that write to a weight."""
    live = {listing.loss}
    kept = []
    for node in reversed(listing.nodes):
        if live.isdisjoint(node.outputs) and not writes_in_place(node):
            continue
        live.update(node_reads(node))
        kept.append(node)
    listing.nodes = kept[::-1]


def _given_in_full(listing: Listing) -> set[ValueName]:
    """Return the inputs and weights in float32. Autocast does not change them."""
    made = {output for node in listing.nodes for output in node.outputs}
    return {name for name, type in listing.types.items() if name not in made and type.dtype == "float32"}


def _stays_full(node: Node, types: dict[ValueName, TensorType], full: set[ValueName], reads: list[ValueName]) -> bool:
    """Return whether a float32 result is float32 under autocast too.

    Only then is a cast to float32 superfluous: autocast makes linear and attention return bf16, and a cast after
    them turns the result into float32 again.
    """
    if types[node.outputs[0]].dtype != "float32":
        return False
    if node.op in _CASTS:
        return True
    namespace, _, name = node.op.partition(".")
    return (
        namespace == "aten"
        and name in _FULL_IN_FULL_OUT
        and any(each in full and (types[each].shape or len(reads) == 1) for each in reads)
    )


def _plain_cast(node: Node, types: dict[ValueName, TensorType]) -> Node:
    """Write every conversion of a tensor as aten.to.dtype. Devices are left to the execution plane."""
    if node.op not in _CASTS or not isinstance(node.args[0], Ref):
        return node
    if any(argument is True for argument in (node.kwargs.get("copy"), *node.args[3:4])):
        return node
    dtype = types[node.outputs[0]].dtype
    return Node(node.name, "aten.to.dtype", (node.args[0], Keyword("dtype", dtype)), {}, node.outputs, node.scope)


def _unchanged(
    node: Node, types: dict[ValueName, TensorType], full: set[ValueName], varying: set[ValueName]
) -> ValueName | None:
    """Return the value that a node passes on unchanged, or None."""
    source = node.args[0].name if node.args and isinstance(node.args[0], Ref) else None
    if source is None or len(node.outputs) != 1 or types[source] != types[node.outputs[0]]:
        return None
    if node.op in _SAME:
        return source
    if node.op in _RESHAPES:
        return source
    if node.op == "aten.dropout.default" and node.args[1] == 0:
        return source
    if node.op == "aten.detach.default":
        return source if source not in varying else None
    if node.op == "aten.to.dtype":
        dtype = types[source].dtype
        if len(node.args) > 2 or node.kwargs:
            return None
        lowered = dtype in ("float16", "bfloat16") or (dtype == "float32" and source not in full)
        return None if lowered else source
    if node.op == "aten.slice.Tensor":
        defaults: tuple[Argument, ...] = (0, None, None, 1)
        _, start, end, step = node.args[1:] + defaults[len(node.args) - 1 :]
        return source if start in (0, None) and end in (_TO_THE_END, None) and step == 1 else None
    return None
