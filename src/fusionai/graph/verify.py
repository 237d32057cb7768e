"""The rules for OP-DAGs and sub-DAGs. They are checked before anything trusts a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise

import msgspec

from fusionai.errors import GraphError
from fusionai.graph.dependencies import reads
from fusionai.graph.evaluation import as_graph, face
from fusionai.graph.model import (
    EvaluationGraph,
    Input,
    Node,
    OpDag,
    Size,
    SubDag,
    TensorType,
    Transfer,
    ValueName,
    Weight,
)
from fusionai.graph.sizes import LARGEST_TENSOR_BYTES, concrete, is_symbol, symbols_of
from fusionai.graph.vocabulary import VOCABULARY, VOCABULARY_VERSION, operator
from fusionai.tensor import FLOATING, tensor_bytes

_PROBLEMS_SHOWN = 10


class GraphLimits(msgspec.Struct, frozen=True):
    """Bounds on what a graph may cost its reader. They lie far above any real model."""

    encoded_bytes: int = 128 << 20
    nodes: int = 300_000
    weights: int = 300_000
    inputs: int = 1_000
    tuple_items: int = 10_000
    text_characters: int = 1_000
    axes: int = 12
    weight_bytes: int = 1 << 38


class _View(msgspec.Struct, frozen=True):
    """The parts that OP-DAGs and sub-DAGs have in common."""

    symbols: dict[str, tuple[ValueName, int]]
    inputs: tuple[Input, ...]
    weights: tuple[Weight, ...]
    nodes: tuple[Node, ...]
    types: dict[ValueName, TensorType]
    received: tuple[Transfer, ...]
    sent: tuple[Transfer, ...]
    loss: ValueName | None
    limits: GraphLimits


def _symbols(view: _View) -> Iterator[str]:
    inputs = {item.name: item.type for item in view.inputs}
    for symbol, (name, axis) in view.symbols.items():
        if not is_symbol(symbol):
            yield f"{symbol[:80]!r} cannot be a symbol: it must be a short identifier"
        type = inputs.get(name)
        if type is not None and (not 0 <= axis < len(type.shape) or type.shape[axis] != symbol):
            yield f"symbol {symbol[:80]!r} does not stand for axis {axis} of the input {name[:80]!r}"


def _counts(view: _View) -> Iterator[str]:
    limits = view.limits
    for what, found, most in (
        ("nodes", len(view.nodes), limits.nodes),
        ("weights", len(view.weights), limits.weights),
        ("inputs", len(view.inputs), limits.inputs),
        ("types", len(view.types), 4 * limits.nodes),
        ("transfers", len(view.received) + len(view.sent), limits.nodes),
    ):
        if found > most:
            yield f"{found} {what}; at most {most} are allowed"


def _lengths(view: _View) -> Iterator[str]:
    longest = view.limits.text_characters
    names = [
        *view.symbols,
        *view.types,
        *(item.name for item in view.inputs),
        *(weight.key for weight in view.weights),
        *(weight.name for weight in view.weights),
        *(alias for weight in view.weights for alias in weight.aliases),
    ]
    for node in view.nodes:
        names += [node.name, node.op, node.scope, *node.outputs, *node.kwargs]
        if len(node.outputs) > view.limits.tuple_items:
            yield f"node {node.name[:80]!r} has {len(node.outputs)} outputs"
        for argument in (*node.args, *node.kwargs.values()):
            if isinstance(argument, tuple) and len(argument) > view.limits.tuple_items:
                yield f"an argument of node {node.name[:80]!r} has {len(argument)} items"
            for atom in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(atom, str) and len(atom) > longest:
                    yield f"an argument of node {node.name[:80]!r} has {len(atom)} characters"
                if isinstance(atom, float) and not math.isfinite(atom):
                    yield f"an argument of node {node.name[:80]!r} is {atom}; write it as a Keyword of kind float"
    for name in names:
        if len(name) > longest:
            yield f"the name {name[:80]!r} has {len(name)} characters; at most {longest} are allowed"


def _unique(view: _View) -> Iterator[str]:
    seen: set[str] = set()
    for name in _defined(view):
        if name in seen:
            yield f"the value {name!r} is defined twice"
        seen.add(name)
    places: set[str] = set()
    for node in view.nodes:
        if node.name in places:
            yield f"two nodes are called {node.name!r}"
        places.add(node.name)


def _defined(view: _View) -> Iterator[ValueName]:
    yield from (item.name for item in view.inputs)
    yield from (weight.name for weight in view.weights)
    yield from (transfer.value for transfer in view.received)
    for node in view.nodes:
        yield from node.outputs


def _ordered(view: _View) -> Iterator[str]:
    known: set[ValueName] = {item.name for item in view.inputs}
    known |= {weight.name for weight in view.weights}
    known |= {transfer.value for transfer in view.received}
    for node in view.nodes:
        for name in reads(node):
            if name not in known:
                yield f"node {node.name!r} takes {name!r}, which nothing before it makes"
        known.update(node.outputs)
    for transfer in view.sent:
        if transfer.value not in known:
            yield f"the stage should send the value {transfer.value!r}, but nothing makes it"


def _operators(view: _View) -> Iterator[str]:
    for node in view.nodes:
        if node.op not in VOCABULARY:
            try:
                operator(node.op)
            except GraphError as error:
                where = f" (in {node.scope})" if node.scope else ""
                yield f"node {node.name!r}{where}: {error}"
        else:
            yield from operator(node.op).problems(node)


def _typed(view: _View) -> Iterator[str]:
    for node in view.nodes:
        for output in node.outputs:
            if output not in view.types:
                yield f"the value {output!r} has no type"
    declared: list[tuple[str, TensorType]] = [
        *view.types.items(),
        *((item.name, item.type) for item in view.inputs),
        *((transfer.value, transfer.type) for transfer in (*view.received, *view.sent)),
    ]
    for name, type in declared:
        if len(type.shape) > view.limits.axes:
            yield f"the value {name!r} has {len(type.shape)} axes; at most {view.limits.axes} are allowed"
        for dim in type.shape:
            yield from _sized(view.symbols, dim, f"the shape of {name!r}")
            if isinstance(dim, int) and dim < 0:
                yield f"the shape of {name!r} has the negative size {dim}"
        known = [dim for dim in type.shape if isinstance(dim, int) and dim > 0]
        if tensor_bytes(type.dtype, known) > LARGEST_TENSOR_BYTES:
            yield f"the value {name!r} of shape {list(type.shape)} is larger than {LARGEST_TENSOR_BYTES:,} bytes"
    for node in view.nodes:
        for argument in (*node.args, *node.kwargs.values()):
            for atom in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(atom, Size):
                    yield from _sized(view.symbols, atom.expression, f"an argument of node {node.name!r}")


def _sized(symbols: Mapping[str, object], dim: int | str, where: str) -> Iterator[str]:
    try:
        unknown = symbols_of(dim) - symbols.keys()
    except GraphError as error:
        yield f"{where}: {error}"
    else:
        if unknown:
            yield f"{where} uses the unknown symbol {min(unknown)!r}"


def _weights(view: _View) -> Iterator[str]:
    first: dict[str, Weight] = {}
    for weight in view.weights:
        same = first.setdefault(weight.key, weight)
        if (same.type, same.kind, same.trainable) != (weight.type, weight.kind, weight.trainable):
            yield f"the weight {weight.key!r} is declared in two ways"
        if any(not isinstance(dim, int) or dim < 0 for dim in weight.type.shape):
            yield f"the weight {weight.key!r} has the shape {list(weight.type.shape)}; its sizes must be numbers"
        elif len(weight.type.shape) > view.limits.axes:
            yield f"the weight {weight.key!r} has {len(weight.type.shape)} axes"
        elif tensor_bytes(weight.type.dtype, concrete(weight.type, {})) > view.limits.weight_bytes:
            yield f"the weight {weight.key!r} is larger than {view.limits.weight_bytes:,} bytes"
        if weight.trainable and weight.type.dtype not in FLOATING:
            yield f"the weight {weight.key!r} is trainable, but its dtype is {weight.type.dtype}"


def _loss(view: _View) -> Iterator[str]:
    if view.loss is None:
        return
    type = view.types.get(view.loss)
    if type is None or not any(view.loss in node.outputs for node in view.nodes):
        yield f"no node makes the loss {view.loss!r}"
    elif type.shape != () or type.dtype not in FLOATING:
        yield f"the loss {view.loss!r} must be a floating-point scalar, and is {type.dtype}{list(type.shape)}"


RULES: tuple[Callable[[_View], Iterable[str]], ...] = (
    _counts,
    _lengths,
    _symbols,
    _unique,
    _ordered,
    _operators,
    _typed,
    _weights,
    _loss,
)
"""Each rule yields one sentence for each problem that it finds."""


def _check(view: _View, what: str) -> None:
    problems: list[str] = []
    for rule in RULES:
        for problem in rule(view):
            problems.append(problem)
            if len(problems) > _PROBLEMS_SHOWN:
                break
        if problems:  # later rules may rely on earlier ones
            break
    if problems:
        more = " and more" if len(problems) > _PROBLEMS_SHOWN else ""
        shown = "; ".join(problem[:400] for problem in problems[:_PROBLEMS_SHOWN])
        raise GraphError(f"{what} breaks {len(problems[:_PROBLEMS_SHOWN])} rules{more}: {shown}")


DEFAULT_LIMITS = GraphLimits()


def verify(graph: OpDag, limits: GraphLimits = DEFAULT_LIMITS) -> None:
    """Check an OP-DAG and its evaluation graph. Raises GraphError with a list of its problems."""
    if graph.vocabulary != VOCABULARY_VERSION:
        raise GraphError(
            f"the OP-DAG {graph.name[:80]!r} is of operator vocabulary {graph.vocabulary}, this FusionAI knows "
            f"{VOCABULARY_VERSION}; use equal versions"
        )
    inputs = {item.name: item for item in graph.inputs}
    for symbol, (name, axis) in graph.symbols.items():
        if name not in inputs:
            raise GraphError(f"symbol {symbol[:80]!r} stands for axis {axis} of {name[:80]!r}, which is no input")
    what = f"the OP-DAG {graph.name[:80]!r}"
    _check(_view_of(graph, limits), what)
    if graph.evaluation is not None:
        _check_places(graph, graph.evaluation, what)
        _check(_view_of(as_graph(graph, graph.evaluation), limits), f"the evaluation graph of {what}")


def _view_of(graph: OpDag, limits: GraphLimits) -> _View:
    return _View(graph.symbols, graph.inputs, graph.weights, graph.nodes, graph.types, (), (), graph.loss, limits)


def _check_places(graph: OpDag, evaluation: EvaluationGraph, what: str) -> None:
    places, last = evaluation.places, len(graph.nodes) - 1
    if len(places) != len(evaluation.nodes):
        raise GraphError(
            f"the evaluation graph of {what} has {len(evaluation.nodes)} operators, and places of {len(places)}"
        )
    if any(later < earlier for earlier, later in pairwise((0, *places, last))):
        raise GraphError(f"the places in the evaluation graph of {what} must rise within 0 to {last}")
    for weight in evaluation.weights:
        if weight.trainable:
            raise GraphError(f"the weight {weight.key[:80]!r} of {what} is trainable, but only evaluation reads it")


def verify_subdag(subdag: SubDag, limits: GraphLimits = DEFAULT_LIMITS) -> None:
    """Check a sub-DAG, with what it runs in evaluation. Raises GraphError with a list of its problems."""
    if subdag.index < 0:
        raise GraphError(f"a sub-DAG has the index {subdag.index}")
    _check_stage(subdag, limits, f"sub-DAG {subdag.index}")
    if subdag.evaluation is not None:
        evaluation = face(subdag, train=False)
        for transfer in (*evaluation.receives, *evaluation.sends):
            if transfer.gradient:
                raise GraphError(f"in evaluation the value {transfer.value[:80]!r} is said to have a gradient")
        _check_stage(evaluation, limits, f"the evaluation of sub-DAG {subdag.index}")


def _check_stage(subdag: SubDag, limits: GraphLimits, what: str) -> None:
    for transfer in (*subdag.receives, *subdag.sends):
        if not 0 <= transfer.source < transfer.target <= limits.nodes:
            raise GraphError(
                f"the value {transfer.value[:80]!r} goes from stage {transfer.source} to {transfer.target}"
            )
    if any(transfer.target != subdag.index for transfer in subdag.receives):
        raise GraphError(f"stage {subdag.index} lists a tensor to receive that is meant for another stage")
    if any(transfer.source != subdag.index for transfer in subdag.sends):
        raise GraphError(f"stage {subdag.index} lists a tensor to send that another stage makes")
    view = _View(
        subdag.symbols,
        subdag.inputs,
        subdag.weights,
        subdag.nodes,
        subdag.types,
        subdag.receives,
        subdag.sends,
        subdag.loss,
        limits,
    )
    _check(view, what)
