"""The planner: from an OP-DAG and a measured pool to a plan.

Load balance: cut points and compnodes are chosen together so that an ideal pipeline's step is shortest
(`partition`), within everybody's memory and with the owner's share pinned. The best few splits are then
really cut and worked through as 1F1B schedules (`evaluation`), and the fastest is the plan.

Left to themselves, stages hold as many microbatches as 1F1B asks for. If that does not fit anywhere, the limit is
lowered step by step to one: slower, but the model trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import msgspec

from fusionai.errors import ConfigError, PlacementError
from fusionai.graph.cuts import cut_points, thinned
from fusionai.graph.model import OpDag, Sizes
from fusionai.scheduling.candidates import as_given, each_alone, evaluated, linked_chains, search
from fusionai.scheduling.evaluation import Evaluated, Task
from fusionai.scheduling.explain import left_out_line
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.polishing import polished
from fusionai.scheduling.profile import Member, Pool
from fusionai.scheduling.segments import Segments, make_segments, reachable
from fusionai.scheduling.shortage import (
    JOINED,
    Remedies,
    no_compnodes,
    no_link_with_owner,
    nothing_fits,
    owner_too_small,
    too_few,
)

_MOST_POSITIONS = 160
"""More cut points than this are thinned out: the solver's tables grow with their square."""

_MOST_POLISHED = 3
"""Best candidates that are polished."""

_MATTERS = 0.02
"""Share of a step that the way to the farthest machine must take for plans without it to be sought."""


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
    segments = make_segments(
        graph,
        sizes,
        cut_positions(task, cuts),
        optimizer_states=optimizer_states,
        cutter=task.costs.cutter(graph),
    )
    if in_order and (cuts is None or len(members) != len(segments.costs)):
        raise PlacementError(
            f"{len(members)} compnodes that can be linked with the owner's machine are to take {len(segments.costs)} "
            "shares in their order; make placement.machines and placement.cuts agree"
        )
    best, owner_failure = _fastest(task, segments, members, counts, given=cuts is not None, in_order=in_order)
    nearer = members
    while best is not None and not in_order:
        # The solver does not see that the step's end waits for whoever is farthest from its driver.
        nearer = _nearer(task, best.plan, nearer)
        if len(nearer) < min(counts):
            break
        few = [count for count in counts if count <= len(nearer)]
        tried, _ = _fastest(task, segments, nearer, few, given=cuts is not None, in_order=False)
        if tried is None or tried.plan.predicted_step_s >= best.plan.predicted_step_s:
            break
        best = tried
    if best is not None:
        return _explained(task, best.plan, members, chosen=bool(compnodes) or cuts is not None)
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


def _fastest(
    task: Task, segments: Segments, members: Sequence[Member], counts: Sequence[int], *, given: bool, in_order: bool
) -> tuple[Evaluated | None, Evaluated | None]:
    """Return the fastest plan found, and else one for which the owner's machine is too small, if that is so.

    `given`: whether the job itself says where it is cut; `in_order`: who takes which part, too.
    """
    apart = [] if given else linked_chains(task, segments, members, counts)
    if 1 in counts and not in_order:
        apart += each_alone(task, segments, members)
    owner_failure: Evaluated | None = None
    for limit in in_flight_limits(task.microbatches, max(counts) + len(segments.outer)):
        if in_order:
            fitting, too_large = as_given(task, segments, members, limit)
        else:
            fitting, too_large = search(task, segments, members, counts, limit)
        others = [evaluated(task, segments, members, devices, bounds, limit) for devices, bounds in apart]
        fitting += [each for each in others if not each.overloaded(task)]
        if fitting:
            # Polishing ends in a local minimum: where it starts matters.
            fitting = sorted(fitting, key=lambda each: each.plan.predicted_step_s)[:_MOST_POLISHED]
            if not in_order:
                fitting = [polished(task, segments, each, limit) for each in fitting]
            return min(fitting, key=lambda each: each.plan.predicted_step_s), None
        owner_failure = too_large or owner_failure
    return None, owner_failure


def _nearer(task: Task, plan: Plan, members: Sequence[Member]) -> list[Member]:
    """Return the members nearer to the owner's machine than the farthest of a plan; nobody if that matters little."""
    away_s = {each.peer: task.link(task.owner.peer, each.peer).rtt_s for each in members}
    farthest_s = max((away_s[stage.peer] for stage in plan.stages if stage.peer in away_s), default=0.0)
    if farthest_s < _MATTERS * plan.predicted_step_s:
        return []
    return [each for each in members if away_s[each.peer] < farthest_s]


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


def cut_positions(task: Task, cuts: Sequence[int] | None) -> list[int]:
    """Return the positions considered, the ends of what may be distributed included."""
    if cuts is not None:
        positions = [task.front, *cuts, task.back]
        if any(early >= late for early, late in pairwise(positions)):
            raise ConfigError(
                f"placement.cuts must rise strictly between {task.front} and {task.back}, the operators that may be "
                f"distributed, and is {list(cuts)}"
            )
        return positions
    cutter = task.costs.cutter(task.graph)
    points = cut_points(task.graph, task.sizes, within=(task.front, task.back), cutter=cutter)
    return [task.front, *thinned(task.graph, task.sizes, points, _MOST_POSITIONS), task.back]


def in_flight_limits(microbatches: int, stages: int) -> list[int]:
    """Return the in-flight limits to try: none, then ever lower ones."""
    limits, limit = [microbatches], min(microbatches, stages) - 1
    while limit >= 1:
        limits.append(limit)
        limit = limit // 2 if limit > 1 else 0
    return limits


def _explained(task: Task, plan: Plan, members: Sequence[Member], *, chosen: bool) -> Plan:
    """Add to a plan's explanation who is left out, and why."""
    used = {stage.peer for stage in plan.stages}
    unlinked = [each.name for each in task.pool.members if each not in members]
    spare = [each.name for each in members if each.peer not in used]
    lines = left_out_line(spare, unlinked, chosen=chosen)
    return msgspec.structs.replace(plan, explanation=(*plan.explanation, *lines))
