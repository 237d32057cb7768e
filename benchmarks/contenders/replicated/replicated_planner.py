"""The planner of replicated stages: how many stages, where the cuts are, and which machines hold which stage.

Machines come in the order of OP-Fence (FusionLLM, arXiv 2410.12707): clusters by bandwidth, slow links crossed least.
For several choices of clusters and every number of stages a dynamic programme finds groups and cuts together
(`stage_cuts.drafts`). The best drafts are improved by single changes (leave a holder out, take one in, move one), each
judged by the estimated step with its links, memory and sums of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from contenders.replicated.job_of_cuts import job_of_cuts
from contenders.replicated.stage_cuts import Draft, drafts
from contenders.routers.routed_job import RoutedJob
from contenders.routers.step_estimate import step_estimate
from fusionai.errors import PlacementError
from fusionai.scheduling.planner import plan
from fusionai.scheduling.search.grouping import fenced, scopes
from fusionai.scheduling.search.segment_costs import SegmentCosts

_MOST_STAGES = 16
_MOST_MACHINES = 128
"""Of a larger pool only the strongest clusters' first machines take part: the programme grows with the square."""

_IMPROVED = 4
"""Drafts that are improved by single changes."""

_LEAST_GAIN = 1e-3
"""Share of a step that a change must save."""

_MOST_CHANGES = 60

Holders = tuple[tuple[int, ...], ...]


def best_stages(work: SegmentCosts) -> tuple[tuple[int, ...], Holders, RoutedJob]:
    """Return the fastest stages found: cuts (indices of `work.positions`), holders by stage, and the job so cut.

    The owner's stages are among them. Raises PlacementError when no cuts give every stage a machine that can hold it.
    """
    found: list[tuple[float, Draft, Holders, RoutedJob]] = []
    jobs: dict[tuple[int, ...], RoutedJob] = {}
    seen: set[Draft] = set()
    for draft in _drafts(work):
        if draft in seen:
            continue
        seen.add(draft)
        if draft.bounds not in jobs:
            jobs[draft.bounds] = job_of_cuts(work, draft.bounds)
        job = jobs[draft.bounds]
        holders = _fitting(work, job, draft)
        if holders is not None:
            found.append((step_estimate(job, holders).step_s, draft, holders, job))
    found = [each for each in found if math.isfinite(each[0])]
    if not found:
        raise PlacementError(
            f"no cut of the model into at most {_MOST_STAGES} stages fits the pool's {len(work.problem.members)} "
            "machines and their links; add compnodes, raise their --memory, or lower training.batch_size"
        )
    found.sort(key=lambda each: each[0])
    best: tuple[float, Draft, Holders, RoutedJob] | None = None
    for _, draft, holders, job in found[:_IMPROVED]:
        better = _improved(work, job, holders)
        step_s = step_estimate(job, better).step_s
        if best is None or step_s < best[0]:
            best = step_s, draft, better, job
    assert best is not None
    return best[1].bounds, best[2], best[3]


def _drafts(work: SegmentCosts) -> Iterator[Draft]:
    """Yield stages to begin with: the programme's, and the pipelines of whole-pipeline planning, one holder each."""
    for scope in scopes(work, fenced(work)):
        order = np.concatenate(list(scope))[:_MOST_MACHINES]
        yield from drafts(work, order, min(_MOST_STAGES, work.count))
    try:
        whole = plan(work.problem)
    except PlacementError:
        return
    number = {member.peer: machine for machine, member in enumerate(work.problem.machines)}
    index = {position: place for place, position in enumerate(work.positions)}
    for pipeline in whole.pipelines:
        inner = pipeline.stages[work.before : len(pipeline.stages) - work.segments.outer_after]
        bounds = (*(index[stage.start] for stage in inner), index[inner[-1].stop])
        yield Draft(bounds, tuple((number[stage.peer],) for stage in inner))


def _fitting(work: SegmentCosts, job: RoutedJob, draft: Draft) -> Holders | None:
    """Return the holders that really cut stages fit on, the owner's stages added; None if a stage has none."""
    groups = [
        tuple(machine for machine in group if job.possible(stage, machine))
        for stage, group in enumerate(draft.holders, start=work.before)
    ]
    if not all(groups):
        return None
    owner = work.problem.owner_index
    own: list[tuple[int, ...]] = [] if owner is None else [(owner,)]
    if any(not job.possible(stage, own[0][0]) for stage in job.pinned):
        return None
    return (*own * work.before, *groups, *own * work.segments.outer_after)


def _improved(work: SegmentCosts, job: RoutedJob, holders: Holders) -> Holders:
    """Return the holders after the best single changes, one after the other, while one saves something."""
    now_s = step_estimate(job, holders).step_s
    for _ in range(_MOST_CHANGES):
        best_s, best = now_s * (1 - _LEAST_GAIN), None
        for tried in _changes(work, job, holders):
            step_s = step_estimate(job, tried).step_s
            if step_s < best_s:
                best_s, best = step_s, tried
        if best is None:
            return holders
        now_s, holders = best_s, best
    return holders


def _changes(work: SegmentCosts, job: RoutedJob, holders: Holders) -> Iterator[Holders]:
    """Yield the holders after each single change. Of machines alike in speed and links, one stands for all."""
    stages = [stage for stage in range(job.stages) if stage not in job.pinned]
    used = {machine for each in holders for machine in each}
    spare = [machine for machine in work.problem.candidates.tolist() if machine not in used]

    def changed(stage: int, group: Sequence[int], other: int = -1, rest: Sequence[int] = ()) -> Holders:
        return tuple(
            tuple(group) if place == stage else tuple(rest) if place == other else each
            for place, each in enumerate(holders)
        )

    for stage in stages:
        for machine in spare:
            if job.possible(stage, machine):
                yield changed(stage, sorted([*holders[stage], machine]))
        if len(holders[stage]) == 1:
            continue
        for machine in holders[stage]:
            rest = [each for each in holders[stage] if each != machine]
            yield changed(stage, rest)
            for other in stages:
                if other != stage and job.possible(other, machine):
                    yield changed(stage, rest, other, sorted([*holders[other], machine]))
