"""The least that a step of any number of pipelines can take: computing, links and the sum of gradients together."""

from __future__ import annotations

import math

import numpy as np

from fusionai.scheduling.bound import (
    least_step_of_pipelines_s,
    least_step_s,
    most_microbatches_per_s,
    weight_paces,
)
from fusionai.scheduling.swarm.work import Work

_MOST_LOOKED_AT = 2000
"""Machines up to which every link is looked at; of more, links count nothing."""


def least_s(work: Work) -> float:
    """Return seconds that no plan goes below which cuts at the planner's positions.

    Links, sums and memory count in open jobs only: the owner's machine has links of its own.
    """
    task, segments, members = work.task, work.segments, work.task.candidates
    whole = work.cutter.costs(task.sizes).whole
    computing_s = _computing_s(work)
    if task.pinned or len(members) > _MOST_LOOKED_AT:
        return computing_s
    last = work.count
    least_bytes = whole.training_bytes(1, task.optimizer_states) - whole.transient_bytes
    budget_N = work.budget_bytes[members]
    bandwidth, delay_s = _best_link(work)
    crossing = np.maximum(segments.forward_bytes_P, segments.gradient_bytes_P)[1:last]
    return least_step_of_pipelines_s(
        computing_s,
        most_microbatches_per_s(
            work.all_costs,
            [task.members[member].device for member in members],
            microbatches=task.microbatches,
            precision=task.precision,
            optimizer_states=task.optimizer_states,
            trained_bytes=work.counted_bytes.tolist(),
        ),
        [bool(each) for each in budget_N >= least_bytes],
        microbatches=task.microbatches,
        most_stages=last,
        most_pipelines=int(budget_N.sum() / least_bytes),
        weight_bytes=float(work.weights_P[-1]),
        crossing_bytes=float(crossing.min()) if len(crossing) else 0.0,
        bandwidth_bytes_per_s=bandwidth,
        delay_s=delay_s,
        paces=weight_paces(
            segments.costs,
            [float(each) for each in work.single_bytes],
            [task.members[member].device for member in members],
            precision=task.precision,
        ),
    )


def _computing_s(work: Work) -> float:
    """Return what no plan goes below: all computing freely divided, and the owner's stages on its machine."""
    task = work.task
    computing = task.machines if task.pinned else task.members
    divided_s = least_step_s(
        work.all_costs,
        [each.device for each in computing],
        microbatches=task.microbatches,
        precision=task.precision,
        optimizer_states=task.optimizer_states,
        trained_bytes=work.counted_bytes.tolist(),
    )
    return max(divided_s, task.microbatches * work.owner_s) if task.pinned else divided_s


def _best_link(work: Work) -> tuple[float, float]:
    """Return the highest bandwidth and the lowest delay between two members."""
    task, members = work.task, work.task.candidates
    best, least = 0.0, math.inf
    for each in members:
        others = members[members != each]
        if len(others):
            best = max(best, float(task.bandwidths(int(each), others).max()))
            least = min(least, float(task.delays(int(each), others).min()))
    return best, least if math.isfinite(least) else 0.0
