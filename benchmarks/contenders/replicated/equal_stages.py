"""Stages of equal computing with equally many holders: what SWARM does without a planner."""

from __future__ import annotations

import numpy as np

from contenders.replicated.job_of_cuts import job_of_cuts
from contenders.routers.routed_job import RoutedJob
from fusionai.errors import PlacementError
from fusionai.scheduling.search.segment_costs import SegmentCosts


def equal_stages(work: SegmentCosts, stages: int) -> tuple[tuple[tuple[int, ...], ...], RoutedJob]:
    """Return the holders by stage and the job, cut in at least `stages` parts of equal computing.

    SWARM (arXiv 2301.11913) cuts a model into equal stages and lets every peer that comes join the stage that has the
    least; here machines are dealt out in their order, one to each stage in turn, the owner's stages apart. Where a
    stage is too large for too many machines, there are more stages.

    Raises:
        PlacementError: even the smallest stages fit on too few machines.
    """
    seconds = np.cumsum((work.forward_NS + work.backward_NS)[0])
    owner = work.problem.owner_index
    for count in range(min(stages, work.count), work.count + 1):
        wanted = np.searchsorted(seconds, seconds[-1] * np.arange(1, count) / count * (1 - 1e-9)) + 1
        steps = np.arange(1, count)
        inner = np.minimum(np.maximum.accumulate(np.maximum(wanted, steps) - steps) + steps, work.count - count + steps)
        job = job_of_cuts(work, (0, *(int(each) for each in inner), work.count))
        groups: list[list[int]] = [[] for _ in range(job.stages)]
        free = [stage for stage in range(job.stages) if stage not in job.pinned]
        for stage in job.pinned:
            if owner is not None and job.possible(stage, owner):
                groups[stage].append(owner)
        for machine in work.problem.candidates.tolist():
            fit = [stage for stage in free if job.possible(stage, machine)]
            if fit:
                stage = min(fit, key=lambda each: len(groups[each]))
                groups[stage].append(machine)
        if all(groups):
            return tuple(tuple(each) for each in groups), job
    raise PlacementError(
        f"no equal stages fit: even {work.count} of them need more memory than enough machines offer; add compnodes, "
        "raise their --memory, or lower training.batch_size"
    )
