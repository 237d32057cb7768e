"""Buffers that training writes to: everything that touches one must be in one stage."""

from __future__ import annotations

from msgspec.structs import replace

from fusionai.errors import GraphError
from fusionai.graph.dependencies import consumers, mutated_values, producers, reads
from fusionai.graph.model import OpDag, ValueName, Weight


def users_of_state(graph: OpDag) -> list[tuple[Weight, list[int]]]:
    """Return each written buffer with the places of the nodes that read or write it, in rising order.

    Nodes of an evaluation graph count by the places of training that they run at: what training writes must be there
    for evaluation, and the other way round.
    """
    written = mutated_values(graph.nodes)
    later: dict[ValueName, list[int]] = {}
    if graph.evaluation is not None:
        nodes, places = graph.evaluation.nodes, graph.evaluation.places
        written |= mutated_values(nodes)
        later = {name: [places[each] for each in users] for name, users in consumers(nodes).items()}
    taken = consumers(graph.nodes)
    users = (
        (weight, sorted([*taken.get(weight.name, ()), *later.get(weight.name, ())]))
        for weight in graph.weights
        if weight.name in written
    )
    return [(weight, places) for weight, places in users if places]


def parting_positions(graph: OpDag) -> frozenset[int]:
    """Return the positions where a cut would part the users of a written buffer."""
    return frozenset(
        position for _, places in users_of_state(graph) for position in range(places[0] + 1, places[-1] + 1)
    )


def check_state_together(graph: OpDag, front: int, back: int, advice: str) -> None:
    """Raise GraphError, naming the buffer, where a cut at `front` or `back` would part the users of a written buffer.

    `advice` ends the error.
    """
    for weight, places in users_of_state(graph):
        if any(places[0] < position <= places[-1] for position in (front, back)):
            raise _parted(graph, weight, advice)


def keep_state_together(graph: OpDag, front: set[int], behind: set[int], advice: str) -> None:
    """Move nodes that touch a written buffer, in place, so that a private job has them all in one of its three parts.

    Copies of a buffer's value depend on nothing else, so they can go where the buffer is written. `front`: places that
    come first. `behind`: places that come last. `advice` ends the error.

    Raises GraphError, naming the buffer, when its users cannot come together.
    """
    made, taken = producers(graph.nodes), consumers(graph.nodes)
    for weight, places in users_of_state(replace(graph, evaluation=None)):
        middle = {place for place in places if place not in front and place not in behind}
        if not behind.isdisjoint(places):
            behind |= {
                place
                for place in middle
                if all(user in behind for output in graph.nodes[place].outputs for user in taken.get(output, ()))
            }
        elif not front.isdisjoint(places):
            front |= {
                place
                for place in middle
                if all(made[name] in front for name in reads(graph.nodes[place]) if name in made)
            }
        parts = {"front" if place in front else "behind" if place in behind else "middle" for place in places}
        if len(parts) > 1:
            raise _parted(graph, weight, advice)


def _parted(graph: OpDag, weight: Weight, advice: str) -> GraphError:
    return GraphError(
        f"buffer {weight.key!r} is read or written both next to the raw inputs or labels and in the middle of the "
        f"model, so a private job of {graph.name!r} cannot keep it in one place; {advice}"
    )


def stored_values(graph: OpDag) -> list[tuple[ValueName, frozenset[ValueName]]]:
    """Return, for each node that writes to buffers, each of them with the other values that the node reads."""
    return [(buffer, frozenset(reads(node)) - {buffer}) for node in graph.nodes for buffer in mutated_values([node])]
