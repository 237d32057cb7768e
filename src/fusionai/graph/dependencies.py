"""Dependencies in an OP-DAG: producers, consumers, gradients, and nodes that any stage can compute again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from fusionai.graph.model import Node, OpDag, Ref, SubDag, ValueName, Weight
from fusionai.graph.vocabulary import operator
from fusionai.tensor import FLOATING

_NO_VALUES: frozenset[ValueName] = frozenset()


def reads(node: Node) -> Iterator[ValueName]:
    """Yield the values that a node takes. A value that it takes twice comes twice."""
    for argument in (*node.args, *node.kwargs.values()):
        for atom in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(atom, Ref):
                yield atom.name


def producers(nodes: Sequence[Node]) -> dict[ValueName, int]:
    """Return the place of the node that makes each value."""
    return {output: place for place, node in enumerate(nodes) for output in node.outputs}


def consumers(nodes: Sequence[Node]) -> dict[ValueName, list[int]]:
    """Return, for each value, the places of the nodes that take it, in rising order."""
    found: dict[ValueName, list[int]] = {}
    for place, node in enumerate(nodes):
        for name in dict.fromkeys(reads(node)):
            found.setdefault(name, []).append(place)
    return found


def mutated_values(nodes: Iterable[Node]) -> frozenset[ValueName]:
    """Return the values that some node writes in place."""
    found = set()
    for node in nodes:
        written = operator(node.op)
        if written.mutates:
            arguments = written.bind(node)
            found |= {ref.name for name in written.mutates if isinstance(ref := arguments[name], Ref)}
    return frozenset(found)


def requiring_gradient(
    nodes: Sequence[Node],
    sources: Iterable[ValueName],
    dtypes: Mapping[ValueName, str],
    taken: Callable[[Node], Iterable[ValueName]] = reads,
) -> frozenset[ValueName]:
    """Return `sources` and the floating-point values that depend on them differentiably."""
    found = set(sources)
    for node in nodes:
        if not found.isdisjoint(taken(node)) and operator(node.op).differentiable:
            found |= {output for output in node.outputs if dtypes[output] in FLOATING}
    return frozenset(found)


def differentiable_ancestors(
    nodes: Sequence[Node],
    targets: Iterable[ValueName],
    dtypes: Mapping[ValueName, str],
    taken: Callable[[Node], Iterable[ValueName]] = reads,
) -> frozenset[ValueName]:
    """Return `targets` and the floating-point values that they depend on differentiably."""
    found = set(targets)
    for node in reversed(nodes):
        if not found.isdisjoint(node.outputs) and operator(node.op).differentiable:
            found |= {name for name in taken(node) if dtypes[name] in FLOATING}
    return frozenset(found)


def value_dtypes(graph: OpDag) -> dict[ValueName, str]:
    """Return the dtype of every value of a graph, inputs and weights included."""
    found: dict[ValueName, str] = {name: type.dtype for name, type in graph.types.items()}
    found |= {item.name: item.type.dtype for item in graph.inputs}
    return found | {weight.name: weight.type.dtype for weight in graph.weights}


def gradient_values(graph: OpDag) -> frozenset[ValueName]:
    """Return the values through which the loss depends differentiably on some trainable weight."""
    dtypes = value_dtypes(graph)
    trainable = [weight.name for weight in graph.weights if weight.trainable]
    forward = requiring_gradient(graph.nodes, trainable, dtypes)
    return forward & differentiable_ancestors(graph.nodes, [graph.loss], dtypes)


def recomputable(graph: OpDag | SubDag, written: frozenset[ValueName] = _NO_VALUES) -> frozenset[int]:
    """Return the places of nodes that any stage can compute by itself, once for all microbatches of one size.

    Such a node depends on sizes, positions and constant tensors only. It does not depend on raw inputs, parameters,
    random numbers, or tensors that training changes. Rotary embeddings and masks are examples. `written`: further
    tensors that change, because evaluation writes to them, or training to what evaluation reads.
    """
    written |= mutated_values(graph.nodes)
    known = {item.name for item in graph.inputs if item.role == "positions"}
    known |= {weight.name for weight in graph.weights if _is_fixed(weight) and weight.name not in written}
    found = set()
    for place, node in enumerate(graph.nodes):
        traits = operator(node.op)
        if traits.random or traits.mutates or any(name not in known for name in reads(node)):
            continue
        if any(output in written for output in node.outputs):
            continue
        known.update(node.outputs)
        found.add(place)
    return frozenset(found)


def weight_views(graph: OpDag) -> frozenset[int]:
    """Return the places of nodes that only show a weight in another shape, such as its transpose."""
    shown = {weight.name for weight in graph.weights}
    found = set()
    for place, node in enumerate(graph.nodes):
        if operator(node.op).op_class == "view" and all(name in shown for name in reads(node)):
            shown.update(node.outputs)
            found.add(place)
    return frozenset(found)


def local_nodes(graph: OpDag, written: frozenset[ValueName] = _NO_VALUES) -> frozenset[int]:
    """Return the places of nodes that every stage runs itself where it needs them: their outputs never travel."""
    found = recomputable(graph, written) | weight_views(graph)
    return frozenset(place for place in found if graph.loss not in graph.nodes[place].outputs)


def weight_values(graph: OpDag) -> frozenset[ValueName]:
    """Return the parameters, trained or frozen, and the values that are computed from them without any input.

    Views of a weight are among them, and what a model makes of its weights before the data comes: a normalised weight,
    or the product of two adapters.
    """
    made = {weight.name for weight in graph.weights if weight.kind == "parameter" or weight.trainable}
    # What is written to a buffer comes of the inputs.
    known = {weight.name for weight in graph.weights} - mutated_values(graph.nodes)
    for node in graph.nodes:
        taken = set(reads(node))
        if taken <= known:
            known.update(node.outputs)
            if not taken.isdisjoint(made):
                made.update(node.outputs)
    return frozenset(made)


def weighted_nodes(graph: OpDag) -> frozenset[int]:
    """Return the places of nodes that bring a weight, or a value made of weights alone, together with other values.

    Whether the weight is trained makes no difference here: a frozen one is as much work, and hides as much of what it
    is multiplied with.
    """
    made = weight_values(graph)
    return frozenset(
        place
        for place, node in enumerate(graph.nodes)
        if not made.isdisjoint(reads(node)) and made.isdisjoint(node.outputs)
    )


def deferrable(subdag: SubDag) -> frozenset[str]:
    """Return the names of the linear calls whose weight's gradient may be computed after the boundary gradients.

    Nothing in backward waits for the gradient of a weight. But when a weight is read more than once, or is tied to
    another one, the parts of its gradient must add up in the order of a single process, so its calls are not deferred.
    A stage that sends no gradient defers nothing, because nobody waits for it.
    """
    if not any(each.gradient for each in subdag.receives):
        return frozenset()
    keys = Counter(weight.key for weight in subdag.weights)
    users = Counter(name for node in subdag.nodes for name in reads(node))
    single = {
        weight.name
        for weight in subdag.weights
        if weight.trainable and not weight.aliases and keys[weight.key] == 1 and users[weight.name] == 1
    }
    shapes = {weight.name: weight.type.shape for weight in subdag.weights}
    found = set()
    for node in subdag.nodes:
        if node.op == "aten.linear.default":
            arguments = operator(node.op).bind(node)
            weight, bias = arguments["weight"], arguments["bias"]
            if not isinstance(weight, Ref) or weight.name not in single or len(shapes[weight.name]) != 2:
                continue
            if bias is None or (isinstance(bias, Ref) and shapes.get(bias.name) == shapes[weight.name][:1]):
                found.add(node.name)
    return frozenset(found)


def ancestors(graph: OpDag, places: Iterable[int]) -> set[int]:
    """Return `places` and the places of all nodes that they depend on."""
    made = producers(graph.nodes)
    found = set(places)
    waiting = list(found)
    while waiting:
        for name in reads(graph.nodes[waiting.pop()]):
            place = made.get(name)
            if place is not None and place not in found:
                found.add(place)
                waiting.append(place)
    return found


def descendants(graph: OpDag, places: Iterable[int]) -> set[int]:
    """Return `places` and the places of all nodes that depend on them."""
    found = set(places)
    values = {output for place in found for output in graph.nodes[place].outputs}
    for place, node in enumerate(graph.nodes):
        if place not in found and any(name in values for name in reads(node)):
            found.add(place)
            values.update(node.outputs)
    return found


def _is_fixed(weight: Weight) -> bool:
    return not weight.trainable and weight.kind != "parameter"
