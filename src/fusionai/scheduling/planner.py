"""The planner: from an OP-DAG and a measured pool to a plan.

Load balance: cut points and compnodes are chosen together so that an ideal pipeline's step is shortest
(`partition`), within everybody's memory and with the owner's share pinned. The best few splits are then
really cut and worked through as 1F1B schedules (`evaluation`), and the fastest is the plan.

Left to themselves, stages hold as many microbatches as 1F1B asks for. If that does not fit anywhere, the limit is
lowered step by step to one: slower, but the model trains.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, permutations
from typing import Literal

import msgspec

from fusionai.errors import ConfigError, PlacementError
from fusionai.graph.cuts import crossing_bytes, cut_points
from fusionai.graph.model import OpDag, Sizes
from fusionai.scheduling.evaluation import Evaluated, Task, evaluate
from fusionai.scheduling.explain import left_out_line
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.partition import Line, Split, best_of_order, frontier, split
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.polishing import polished
from fusionai.scheduling.profile import Member, Pool
from fusionai.scheduling.segments import MEMORY_MARGIN, Segments, make_line, make_segments, reachable
from fusionai.scheduling.shortage import (
    JOINED,
    Remedies,
    no_compnodes,
    no_link_with_owner,
    nothing_fits,
    owner_too_small,
    too_few,
)
from fusionai.scheduling.swarm.single import best_single_chains
from fusionai.scheduling.swarm.task import SwarmTask

_MOST_POSITIONS = 160
"""More cut points than this are thinned out: the solver's tables grow with their square."""

_MOST_POLISHED = 3
"""Best candidates that are polished."""

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


def plan_training(
    graph: OpDag,
    *,
    graph_hash: str,
    sizes: Sizes,
    microbatches: int,
    optimizer_states: int,
    precision: Literal["fp32", "bf16"],
    pool: Pool,
    owner: Member,
    privacy: Literal["private", "open"],
    front: int,
    back: int,
    compnodes: int = 0,
    cuts: Sequence[int] | None = None,
    in_order: bool = False,
    split_backward: bool = True,
    remedies: Remedies = JOINED,
) -> Plan:
    """Return the fastest plan. Blocks for up to seconds: call it in a thread.

    Nodes [0, front) and [back, N) run on the owner's machine; the graph must be arranged for that already.
    `compnodes` is how many others to use, 0 for as many as serve best. `cuts` are cut positions strictly between
    `front` and `back` to use instead of the planner's; they decide how many compnodes are used, not which. With
    `in_order` the members of the pool take the parts between `cuts` in their order: nothing is left to choose.

    `split_backward`: see `evaluation.Task`. `remedies`: what errors advise.

    Raises PlacementError with what is missing when no plan meets the constraints, and ConfigError for `cuts` that do
    not suit the graph or `compnodes`.
    """
    task = Task(
        graph=graph,
        graph_hash=graph_hash,
        sizes=sizes,
        microbatches=microbatches,
        optimizer_states=optimizer_states,
        precision=precision,
        pool=pool,
        owner=owner,
        privacy=privacy,
        front=front,
        back=back,
        split_backward=split_backward,
    )
    if not pool.members:
        raise no_compnodes(remedies)
    members = [each for each in pool.members if reachable(each, owner)]
    if not members:
        raise no_link_with_owner(pool.members, owner, remedies)
    counts = _counts(compnodes, cuts, members, remedies)
    segments = make_segments(graph, sizes, _positions(task, cuts), optimizer_states=optimizer_states)
    if in_order and (cuts is None or len(members) != len(segments.costs)):
        raise PlacementError(
            f"{len(members)} compnodes that can be linked with the owner's machine are to take {len(segments.costs)} "
            "shares in their order; make placement.machines and placement.cuts agree"
        )
    chains = _linked_chains(task, segments, members, counts) if cuts is None else []
    owner_failure: Evaluated | None = None
    for limit in _limits(microbatches, max(counts) + len(segments.outer)):
        if in_order:
            fitting, too_large = _as_given(task, segments, members, limit)
        else:
            fitting, too_large = _search(task, segments, members, counts, limit)
        linked = [_evaluated(task, segments, members, devices, bounds, limit) for devices, bounds in chains]
        fitting += [each for each in linked if not each.overloaded(task)]
        if fitting:
            # Polishing ends in a local minimum: where it starts matters.
            fitting = sorted(fitting, key=lambda each: each.plan.predicted_step_s)[:_MOST_POLISHED]
            if not in_order:
                fitting = [polished(task, segments, each, limit) for each in fitting]
            best = min(fitting, key=lambda each: each.plan.predicted_step_s)
            return _explained(task, best.plan, members, chosen=bool(compnodes) or cuts is not None)
        owner_failure = too_large or owner_failure
    if owner_failure:
        raise owner_too_small(owner, owner_failure.needs_bytes[owner.peer])
    raise nothing_fits(
        segments,
        members,
        fewest=min(counts),
        most=max(counts),
        optimizer_states=optimizer_states,
        remedies=remedies,
    )


def _counts(compnodes: int, cuts: Sequence[int] | None, members: Sequence[Member], remedies: Remedies) -> list[int]:
    """Return the numbers of compnodes to consider."""
    wanted = len(cuts) + 1 if cuts is not None else compnodes
    if cuts is not None and compnodes not in (0, wanted):
        raise ConfigError(
            f"placement.cuts makes {wanted} stages for compnodes, but placement.compnodes is {compnodes}; make them "
            "agree, or leave one out"
        )
    if wanted > len(members):
        raise too_few(wanted, len(members), remedies)
    return [wanted] if wanted else list(range(1, len(members) + 1))


def _positions(task: Task, cuts: Sequence[int] | None) -> list[int]:
    """Return the positions considered, the ends of what may be distributed included."""
    if cuts is not None:
        positions = [task.front, *cuts, task.back]
        if any(early >= late for early, late in pairwise(positions)):
            raise ConfigError(
                f"placement.cuts must rise strictly between {task.front} and {task.back}, the operators that may be "
                f"distributed, and is {list(cuts)}"
            )
        return positions
    points = cut_points(task.graph, task.sizes, within=(task.front, task.back))
    if len(points) > _MOST_POSITIONS:
        # The cheapest point of each stretch: an even choice that keeps the good ones.
        crossing = crossing_bytes(task.graph, task.sizes)
        step = len(points) / _MOST_POSITIONS
        stretches = [points[int(k * step) : int((k + 1) * step)] for k in range(_MOST_POSITIONS)]
        points = [min(stretch, key=lambda point: crossing[point]) for stretch in stretches if stretch]
    return [task.front, *points, task.back]


def _limits(microbatches: int, stages: int) -> list[int]:
    """Return the in-flight limits to try: none, then ever lower ones."""
    limits, limit = [microbatches], min(microbatches, stages) - 1
    while limit >= 1:
        limits.append(limit)
        limit = limit // 2 if limit > 1 else 0
    return limits


def _search(
    task: Task, segments: Segments, members: Sequence[Member], counts: Sequence[int], limit: int
) -> tuple[list[Evaluated], Evaluated | None]:
    """Return evaluated plans that fit, and else one for which the owner's machine is too small, if that is so."""
    budgets = [each.device.memory_bytes / MEMORY_MARGIN for each in members]
    place = {member.peer: index for index, member in enumerate(members)}
    owner_failure: Evaluated | None = None
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
            found |= {(each.devices, each.bounds) for each in split(line, counts)}
            if task.microbatches <= _FEW_MICROBATCHES and len(members) <= _FEW_MACHINES:
                found |= {(each.devices, each.bounds) for each in _best_of_orders(line, counts)}
        tried = [_evaluated(task, segments, members, *each, limit) for each in sorted(found)]
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


def _as_given(
    task: Task, segments: Segments, members: Sequence[Member], limit: int
) -> tuple[list[Evaluated], Evaluated | None]:
    """Return the plan that gives each member one segment, in their order; see `_search`."""
    made = _evaluated(task, segments, members, range(len(members)), range(len(members) + 1), limit)
    overloaded = made.overloaded(task)
    return ([] if overloaded else [made]), made if task.owner.peer in overloaded else None


def _linked_chains(
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


def _evaluated(
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


def _explained(task: Task, plan: Plan, members: Sequence[Member], *, chosen: bool) -> Plan:
    """Add to a plan's explanation who is left out, and why."""
    used = {stage.peer for stage in plan.stages}
    unlinked = [each.name for each in task.pool.members if each not in members]
    spare = [each.name for each in members if each.peer not in used]
    lines = left_out_line(spare, unlinked, chosen=chosen)
    return msgspec.structs.replace(plan, explanation=(*plan.explanation, *lines))
