"""Plans that are worth working through as schedules: those of the solver, and others that it does not see as good.

The solver reckons with an ideal pipeline: what ends the step, and how far the driver is away, it does not know.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, permutations

from fusionai.scheduling.evaluation import Evaluated, Task, evaluate
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.partition import Line, Split, best_of_order, frontier, split
from fusionai.scheduling.profile import Member
from fusionai.scheduling.segments import MEMORY_MARGIN, Segments, make_line
from fusionai.scheduling.swarm.single import best_single_chains
from fusionai.scheduling.swarm.task import SwarmTask

_FEW_MICROBATCHES = 16
"""Up to so many, what the last microbatch leaves to compute matters, and candidates are sought with it and without."""

_FEW_MEMBERS = 6
"""Up to so many every set and order is looked at in any case (`partition`)."""

_FEW_MACHINES = 3
"""With few microbatches and so few compnodes the best split of each order is worked through: of ideal pipelines that
are about equally fast, schedules differ."""

_TOLERANCE_OF_ORDERS = 5e-3

_CORRECTIONS = 3
"""How often the solver is told that a machine holds less than it reckoned with."""

_EXCHANGES, _EXCHANGES_OF_MANY = 40, 5
"""Orders of machines that are tried from the best one found, with few members and with many."""

_MOST_ALONE = 32
"""Kinds of machines that are looked at alone."""


def search(
    task: Task, segments: Segments, members: Sequence[Member], counts: Sequence[int], limit: int
) -> tuple[list[Evaluated], Evaluated | None]:
    """Return evaluated plans of the solver that fit, and else one that is too large for the owner's machine, if any."""
    budgets = [each.device.memory_bytes / MEMORY_MARGIN for each in members]
    place = {member.peer: index for index, member in enumerate(members)}
    owner_failure: Evaluated | None = None
    # Where chains follow the links, exchanges by speed found nothing better in any of twenty random pools.
    exchanges = _EXCHANGES if len(members) <= _FEW_MEMBERS else _EXCHANGES_OF_MANY
    for _ in range(1 + _CORRECTIONS):
        found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for hide_deferred in _hidings(task):
            line = make_line(
                segments,
                members,
                task.owner,
                task.pool,
                microbatches=task.microbatches,
                precision=task.precision,
                budgets_bytes=budgets,
                in_flight_limit=limit,
                hide_deferred=hide_deferred,
            )
            found |= {(each.devices, each.bounds) for each in split(line, counts, exchanges=exchanges)}
            if task.microbatches <= _FEW_MICROBATCHES and len(members) <= _FEW_MACHINES:
                found |= {(each.devices, each.bounds) for each in _best_of_orders(line, counts)}
        tried = [evaluated(task, segments, members, *each, limit) for each in sorted(found)]
        if fitting := [each for each in tried if not each.overloaded(task)]:
            return fitting, None
        shrunk = False
        for each in tried:
            overloaded = each.overloaded(task)
            if task.owner.peer in overloaded:
                owner_failure = each
            for peer, share in overloaded.items():
                if peer in place:
                    # The sums over segments were too low by this share.
                    index = place[peer]
                    budgets[index] = min(budgets[index], share * members[index].device.memory_bytes / MEMORY_MARGIN)
                    shrunk = True
        if not shrunk:
            break
    return [], owner_failure


def as_given(
    task: Task, segments: Segments, members: Sequence[Member], limit: int
) -> tuple[list[Evaluated], Evaluated | None]:
    """Return the plan that gives each member one segment, in their order; see `search`."""
    made = evaluated(task, segments, members, range(len(members)), range(len(members) + 1), limit)
    overloaded = made.overloaded(task)
    return ([] if overloaded else [made]), made if task.owner.peer in overloaded else None


def each_alone(
    task: Task, segments: Segments, members: Sequence[Member]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return each kind of member with everything that may be distributed, as members and positions.

    Members are of one kind whose rates, memory, and links with the owner's machine are the same.
    """
    kinds: dict[object, int] = {}
    for index, each in enumerate(members):
        rates = *sorted(each.device.flops_per_s.items()), each.device.memory_bytes_per_s, each.device.overhead_s
        ends = task.link(task.owner.peer, each.peer), task.link(each.peer, task.owner.peer)
        lines = task.pool.lines.get(each.peer)
        kinds.setdefault((rates, each.device.memory_bytes, each.device.update_bytes_per_s, *ends, lines), index)
    return [((index,), (0, len(segments.positions) - 1)) for index in list(kinds.values())[:_MOST_ALONE]]


def linked_chains(
    task: Task, segments: Segments, members: Sequence[Member], counts: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return chains that follow the links, as members and positions; the search here goes by speed first."""
    if len(members) <= _FEW_MEMBERS:
        return []
    swarm = SwarmTask(
        graph=task.graph,
        graph_hash=task.graph_hash,
        sizes=task.sizes,
        microbatches=task.microbatches,
        optimizer_states=task.optimizer_states,
        precision=task.precision,
        members=tuple(members),
        owner=task.owner,
        links=PoolLinks(task.pool, [*(each.peer for each in members), task.owner.peer]),
        privacy=task.privacy,
        front=task.front,
        back=task.back,
    )
    found = []
    for chain in best_single_chains(swarm):
        # That planner thins its positions out by itself.
        inner = [bisect_left(segments.positions, position) for position in chain.cuts]
        bounds = (0, *inner, len(segments.positions) - 1)
        if len(chain.machines) in counts and all(early < late for early, late in pairwise(bounds)):
            found.append((chain.machines, bounds))
    return found


def _best_of_orders(line: Line, counts: Sequence[int]) -> Iterator[Split]:
    """Yield the best split of each order of devices."""
    for count in counts:
        for order in permutations(range(line.devices), count):
            splits = frontier(line, partial(best_of_order, line, order), _TOLERANCE_OF_ORDERS)
            if (best := min(splits, key=lambda each: each.objective_s(line.microbatches), default=None)) is not None:
                yield best


def _hidings(task: Task) -> tuple[bool, ...]:
    """Return for which of the solver's numbers to search (`make_line`)."""
    if not task.split_backward:
        return (False,)
    return (True, False) if task.microbatches <= _FEW_MICROBATCHES else (True,)


def evaluated(
    task: Task,
    segments: Segments,
    members: Sequence[Member],
    devices: Sequence[int],
    bounds: Sequence[int],
    limit: int,
) -> Evaluated:
    """Add the owner's stages to a split, given by members and positions, and evaluate it."""
    cuts = [segments.positions[bound] for bound in bounds]
    peers = [members[device].peer for device in devices]
    if task.front > 0:
        peers.insert(0, task.owner.peer)
    if task.back < len(task.graph.nodes):
        peers.append(task.owner.peer)
    inner = [position for position in cuts if 0 < position < len(task.graph.nodes)]
    return evaluate(task, inner, peers, limit)
