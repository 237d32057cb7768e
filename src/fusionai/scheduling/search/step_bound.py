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
from fusionai.scheduling.search.segment_costs import SegmentCosts

_MOST_LOOKED_AT = 2000
"""Machines up to which every link is looked at; of more, links count nothing."""


def least_s(costs: SegmentCosts) -> float:
    """Return seconds that no plan goes below which cuts at the planner's positions.

    Links, sums and memory count in open jobs only: the owner's machine has links of its own.
    """
    problem, segments, members = costs.problem, costs.segments, costs.problem.candidates
    whole = problem.costs.cutter(problem.graph).costs(problem.sizes).whole
    computing_s = _computing_s(costs)
    if problem.pinned or len(members) > _MOST_LOOKED_AT:
        return computing_s
    last = costs.count
    least_bytes = whole.training_bytes(1, problem.optimizer_states) - whole.transient_bytes
    budget_N = costs.budget_bytes[members]
    bandwidth, delay_s = _best_link(costs)
    crossing = np.maximum(segments.forward_bytes_P, segments.gradient_bytes_P)[1:last]
    return least_step_of_pipelines_s(
        computing_s,
        most_microbatches_per_s(
            costs.all_costs,
            [problem.members[member].device for member in members],
            microbatches=problem.microbatches,
            precision=problem.precision,
            optimizer_states=problem.optimizer_states,
            trained_bytes=costs.counted_bytes.tolist(),
        ),
        [bool(each) for each in budget_N >= least_bytes],
        microbatches=problem.microbatches,
        most_stages=last,
        most_pipelines=int(budget_N.sum() / least_bytes),
        weight_bytes=float(costs.weights_P[-1]),
        crossing_bytes=float(crossing.min()) if len(crossing) else 0.0,
        bandwidth_bytes_per_s=bandwidth,
        delay_s=delay_s,
        paces=weight_paces(
            segments.costs,
            [float(each) for each in costs.single_bytes],
            [problem.members[member].device for member in members],
            precision=problem.precision,
        ),
    )


def _computing_s(costs: SegmentCosts) -> float:
    """Return what no plan goes below: all computing freely divided, and the owner's stages on its machine."""
    problem = costs.problem
    computing = problem.machines if problem.pinned else problem.members
    divided_s = least_step_s(
        costs.all_costs,
        [each.device for each in computing],
        microbatches=problem.microbatches,
        precision=problem.precision,
        optimizer_states=problem.optimizer_states,
        trained_bytes=costs.counted_bytes.tolist(),
    )
    return max(divided_s, problem.microbatches * costs.owner_s) if problem.pinned else divided_s


def _best_link(costs: SegmentCosts) -> tuple[float, float]:
    """Return the highest bandwidth and the lowest delay between two members."""
    problem, members = costs.problem, costs.problem.candidates
    best, least = 0.0, math.inf
    for each in members:
        others = members[members != each]
        if len(others):
            best = max(best, float(problem.bandwidths(int(each), others).max()))
            least = min(least, float(problem.delays(int(each), others).min()))
    return best, least if math.isfinite(least) else 0.0
