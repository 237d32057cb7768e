"""Which machines can run a job at all, by what their planes say of themselves. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from fusionai.broker.records import MemberRecord
from fusionai.errors import PlacementError
from fusionai.graph.cuts import cut
from fusionai.graph.model import OpDag

_MOST_LINES = 8
"""Machines that a plan names one by one: the plan travels in a message and is kept."""


def obstacles(graph: OpDag, front: int, back: int, members: Sequence[MemberRecord]) -> dict[str, str]:
    """Return why machines cannot train the nodes [front, back) of a graph, by name; those that can are left out.

    Raises PlacementError if nothing lies between `front` and `back`.

    A machine that told no abilities, as older versions do, is taken to have them all: its plane refuses a stage that it
    cannot run. Takes a millisecond for each few operators: call it in a thread.
    """
    if not any(each.device is not None and each.device.abilities is not None for each in members):
        return {}
    if front >= back:
        raise PlacementError(
            f"no operator is left for compnodes: the owner keeps those before {front} and from {back} on; train a "
            "larger model, or plan the job as open"
        )
    ends = [position for position in (front, back) if 0 < position < len(graph.nodes)]
    distributed = cut(graph, ends)[1 if front > 0 else 0]
    found: dict[str, str] = {}
    known: dict[object, str | None] = {}
    for member in members:
        abilities = None if member.device is None else member.device.abilities
        if abilities is None:
            continue
        if abilities not in known:
            known[abilities] = abilities.obstacle(distributed, "training")
        if (obstacle := known[abilities]) is not None:
            found[member.name] = obstacle
    return found


def able(members: Sequence[MemberRecord], unable: dict[str, str]) -> list[MemberRecord]:
    """Return the machines that can run a job.

    Raises PlacementError if there were machines and none of them can; the text names the first and what it lacks.
    """
    found = [each for each in members if each.name not in unable]
    if members and not found:
        name, obstacle = next(iter(unable.items()))
        others = f" (and {len(unable) - 1} others cannot either)" if len(unable) > 1 else ""
        raise PlacementError(
            f"no free compnode can run this model: {name} cannot, {obstacle}{others}; run `fusionai join TOKEN` on a "
            "machine with another plane, or change the model"
        )
    return found


def unable_lines(unable: dict[str, str]) -> tuple[str, ...]:
    """Return lines for people about machines that a plan leaves out because their planes cannot run the model."""
    lines = [f"{name} is left out: {obstacle}" for name, obstacle in islice(unable.items(), _MOST_LINES)]
    more = len(unable) - len(lines)
    return (*lines, *([f"{more} more machines are left out because their planes cannot run the model"] if more else ()))
