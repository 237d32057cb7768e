"""How a graph writes to buffers: it computes with values, and puts the last one into the buffer in the end.

Torch writes in place as often as the model says so, and what reads the buffer before or after depends on the order of
operators. An OP-DAG may be cut, and its operators may be run in another order that keeps dependencies. Here every write
becomes a new value, the buffer's old value is a copy, and one `aten.copy_` stores what the next microbatch finds. The
copy also keeps what backward needs, and evaluation leaves the `aten.copy_` out and computes what it read.

A buffer that nothing but one write touches, such as a count of batches, stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fusionai.errors import GraphError
from fusionai.graph.capture.listing import Listing, node_reads, rewrite_values
from fusionai.graph.capture.state import ModuleState, value_name
from fusionai.graph.dependencies import differentiable_ancestors, requiring_gradient
from fusionai.graph.model import Argument, Keyword, Node, Ref, ValueName, WeightKey
from fusionai.graph.vocabulary import VOCABULARY, operator

COPY = "aten.copy_.default"


def updates_as_values(listing: Listing, state: ModuleState) -> None:
    """Rewrite, in place, the operators of a listing that write to buffers.

    Raises GraphError, naming the buffer, where its next value carries a gradient from one call to the next, and where
    a normalisation writes to it as well.
    """
    written = _written_by_hand(listing, state)
    if written:
        _Rewriting(listing, state, written).run()


def writes_in_place(node: Node) -> bool:
    """Return whether a node of a listing writes to its first argument, which then is a weight."""
    parts = node.op.split(".")
    return parts[0] == "aten" and parts[1].endswith("_") and not parts[1].endswith("__")


def _written_by_hand(listing: Listing, state: ModuleState) -> frozenset[ValueName]:
    """Return the buffers that need rewriting."""
    touched = Counter(name for node in listing.nodes for name in set(node_reads(node)))
    read = {name for node in listing.nodes for name in node_reads(node)} | {listing.loss}
    found: set[ValueName] = set()
    statistics: dict[ValueName, Node] = {}
    carrying = _carrying(listing, state)
    for node in listing.nodes:
        if writes_in_place(node):
            buffer = _first(node)
            alone = touched[buffer] == 1 and read.isdisjoint(node.outputs) and node.op in VOCABULARY
            if not alone or not carrying.isdisjoint(node_reads(node)):
                found.add(buffer)
        elif node.op in VOCABULARY:
            kind = operator(node.op)
            bound = kind.bind(node) if kind.mutates else {}
            statistics |= {each.name: node for name in kind.mutates if isinstance(each := bound[name], Ref)}
    for buffer in sorted(found & statistics.keys()):
        raise GraphError(
            f"buffer {_key(buffer)!r} is written to by {statistics[buffer].op} in module {statistics[buffer].scope!r} "
            "and by the model itself; let one of the two write to it"
        )
    return frozenset(found)


def _carrying(listing: Listing, state: ModuleState) -> frozenset[ValueName]:
    """Return the values that depend differentiably on a parameter that is trained."""
    trained = [
        value_name(key)
        for key, entry in state.entries.items()
        if entry.kind == "parameter" and entry.tensor.requires_grad
    ]
    return requiring_gradient(listing.nodes, trained, _dtypes(listing))


def _dtypes(listing: Listing) -> Mapping[ValueName, str]:
    return {name: type.dtype for name, type in listing.types.items()}


def _first(node: Node) -> ValueName:
    target = node.args[0]
    assert isinstance(target, Ref)
    return target.name


def _key(buffer: ValueName) -> str:
    return buffer.removeprefix(value_name(WeightKey("")))


class _Rewriting:
    def __init__(self, listing: Listing, state: ModuleState, written: frozenset[ValueName]) -> None:
        self._listing, self._state, self._written = listing, state, written
        self._weights = {value_name(key) for key in state.entries}
        self._nodes: list[Node] = []
        self._old: dict[ValueName, ValueName] = {}
        """By buffer: its value before the first write."""
        self._current: dict[ValueName, ValueName] = {}
        """By buffer: the value that it would have now."""
        self._same: dict[ValueName, ValueName] = {}
        """By result of a write: the buffer, which it is another name of."""
        self._views: dict[ValueName, tuple[Node, ValueName, ValueName]] = {}
        """By view: the node that makes it, the value that it shows, and what stood for that value when it was made."""
        self._shown: dict[tuple[ValueName, ValueName], ValueName] = {}
        """By view and by the current value of what it shows: the view of that value."""

    def run(self) -> None:
        for node in self._listing.nodes:
            self._take(node)
        self._listing.loss = self._now(self._listing.loss, "")
        self._listing.nodes = self._nodes
        self._store()

    def _take(self, node: Node) -> None:
        if writes_in_place(node) and _first(node) in self._written:
            self._write(node)
            return
        source = _shown_by(node, self._listing)
        moved = rewrite_values(node, lambda name: self._now(name, node.scope))
        self._nodes.append(moved)
        if source is not None and self._buffer_of(source) is not None:
            shown = next(node_reads(moved))
            self._views.update((output, (node, source, shown)) for output in node.outputs)

    def _write(self, node: Node) -> None:
        """Compute the next value of a buffer without writing to it."""
        buffer, output, types = _first(node), node.outputs[0], self._listing.types
        self._same[output] = buffer
        if node.op != COPY:
            moved = rewrite_values(node, lambda name: self._now(name, node.scope))
            namespace, name, overload = node.op.split(".")
            plain = f"{namespace}.{name.removesuffix('_')}.{overload}"
            self._nodes.append(Node(output, plain, moved.args, moved.kwargs, (output,), node.scope))
            self._current[buffer] = output
            return
        source = node.args[1]
        assert isinstance(source, Ref)
        value, wanted = self._now(source.name, node.scope), types[buffer]
        if value in self._weights:
            value = self._copy_of(value, node.scope, output)  # a normalisation may write to it later
        if types[value].dtype != wanted.dtype:
            value = self._add(
                f"{output}.cast", "aten.to.dtype", value, Keyword("dtype", wanted.dtype), buffer, node.scope
            )
        if types[value].shape != wanted.shape:
            value = self._add(f"{output}.expand", "aten.expand.default", value, wanted.shape, buffer, node.scope)
        self._current[buffer] = value

    def _add(self, name: str, op: str, source: ValueName, argument: Argument, like: ValueName, scope: str) -> ValueName:
        """Append an operator with one tensor argument; its result has the shape or the dtype of `like`."""
        output, types = ValueName(name), self._listing.types
        cast = op == "aten.to.dtype"
        types[output] = type(types[source])(types[like].dtype, types[source].shape) if cast else types[like]
        self._nodes.append(Node(output, op, (Ref(source), argument), {}, (output,), scope))
        return output

    def _buffer_of(self, name: ValueName) -> ValueName | None:
        """Return the buffer whose memory a value lies in, of those that are rewritten."""
        while name in self._views:
            name = self._views[name][1]
        name = self._same.get(name, name)
        return name if name in self._written else None

    def _now(self, name: ValueName, scope: str) -> ValueName:
        """Return the value that stands for a value now, after what has been written so far."""
        name = self._same.get(name, name)
        if name in self._written:
            if name not in self._current:
                self._current[name] = self._old[name] = self._copy_of(name, scope, ValueName(f"{name}.old"))
            return self._current[name]
        if name not in self._views:
            return name
        node, source, shown = self._views[name]
        now = self._now(source, scope)
        if now == shown:
            return name
        if (name, now) not in self._shown:
            renamed = {output: ValueName(f"{output}.of.{now}") for output in node.outputs}
            self._listing.types.update((renamed[output], self._listing.types[output]) for output in node.outputs)
            outputs = tuple(renamed.values())
            if operator(node.op).op_class != "view":
                buffer = self._buffer_of(source) or source
                raise GraphError(
                    f"{node.op} in module {node.scope!r} takes buffer {_key(buffer)!r} before it is written to, and "
                    "its result is read afterwards; read the buffer again there, or take a clone()"
                )
            args = (Ref(now), *node.args[1:])
            self._nodes.append(Node(outputs[0], node.op, args, node.kwargs, outputs, scope))
            self._shown.update({(output, now): renamed[output] for output in node.outputs})
        return self._shown[name, now]

    def _copy_of(self, buffer: ValueName, scope: str, output: ValueName) -> ValueName:
        self._listing.types[output] = self._listing.types[buffer]
        self._nodes.append(Node(output, "aten.clone.default", (Ref(buffer),), {}, (output,), scope))
        return output

    def _store(self) -> None:
        """Store each buffer's last value, right after it is made."""
        listing = self._listing
        carrying = _carrying(listing, self._state)
        needed = differentiable_ancestors(listing.nodes, [listing.loss], _dtypes(listing))
        made = {output: place for place, node in enumerate(listing.nodes) for output in node.outputs}
        after: dict[int, list[Node]] = {}
        for buffer in sorted(self._current):
            old, last = self._old.get(buffer), self._current[buffer]
            if last == old:
                continue
            place = max(made.get(each, -1) for each in (old, last) if each is not None)
            scope = listing.nodes[max(place, 0)].scope
            stored: list[Node] = []
            if last in carrying:
                if old in needed:
                    raise GraphError(
                        f"buffer {_key(buffer)!r} is given a value that carries a gradient, and the loss of the "
                        "next call depends on it, so backward would go through the calls before, where torch itself "
                        "stops with an error; store value.detach()"
                    )
                detached = ValueName(f"{buffer}.detached")
                listing.types[detached] = listing.types[last]
                stored.append(Node(detached, "aten.detach.default", (Ref(last),), {}, (detached,), scope))
                last = detached
            output = ValueName(f"{buffer}.stored")
            listing.types[output] = listing.types[buffer]
            stored.append(Node(output, COPY, (Ref(buffer), Ref(last)), {}, (output,), scope))
            after.setdefault(place, []).extend(stored)
        listing.nodes = [
            *after.get(-1, ()),
            *(each for place, node in enumerate(listing.nodes) for each in (node, *after.get(place, ()))),
        ]


def _shown_by(node: Node, listing: Listing) -> ValueName | None:
    """Return the value whose memory the outputs of a node may lie in."""
    known = VOCABULARY.get(node.op)
    if known is None or known.view is None or not node.args or not isinstance(node.args[0], Ref):
        return None
    source, types = node.args[0].name, listing.types
    return source if types[source].dtype == types[node.outputs[0]].dtype else None
