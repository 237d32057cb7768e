"""A single pipeline with given machines and cuts: what the simple baselines have in common."""

from __future__ import annotations

import numpy as np

from fusionai.errors import PlacementError
from fusionai.scheduling.evaluation import Evaluated
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.search.chain import measured
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.step_bound import least_s
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain
from fusionai.scheduling.worked_pipeline import WorkedPipeline

_LIMITS = (8, 3, 1)


def chain_plan(work: SegmentCosts, machines: Indices, bounds: Indices) -> Plan:
    """Return the plan of one pipeline, fewer microbatches in flight where memory asks for it.

    Raises PlacementError when it does not fit, or neighbours cannot be linked.
    """
    if (found := chain_outcome(work, machines, bounds)) is not None:
        return found.plan(bound_step_s=least_s(work))
    raise PlacementError(
        f"this split over {len(machines)} machines in a fixed order does not fit: a stage is larger than its machine's "
        "memory, or two neighbours cannot be linked; use the planner, which looks at both"
    )


def chain_outcome(work: SegmentCosts, machines: Indices, bounds: Indices) -> Evaluated | None:
    """Return what one pipeline makes of a step; None when it does not fit, or neighbours cannot be linked."""
    if (found := chain_run(work, machines, bounds, work.problem.microbatches)) is None:
        return None
    whole = evaluated_chains(work, [found])
    return whole if whole.possible else None


def chain_run(work: SegmentCosts, machines: Indices, bounds: Indices, microbatches: int) -> WorkedPipeline | None:
    """Return the schedule of a pipeline that takes some of a step's microbatches; None when it does not fit."""
    for limit in (microbatches, *_LIMITS):
        found = worked_chain(work, measured(work, machines, bounds, 1.0, limit), microbatches)
        if found.possible and not evaluated_chains(work, [found]).overloaded:
            return found
    return None


def shares_to_bounds(amount_S: Floats, shares_D: Floats) -> Indices:
    """Return bounds that deal segments of the given amounts out in proportion to shares, none of them empty."""
    count, segments = len(shares_D), len(amount_S)
    done = np.concatenate([[0.0], np.cumsum(amount_S)])
    wanted = done[-1] * np.cumsum(shares_D)[:-1] / shares_D.sum()
    nearest = np.abs(done[None] - wanted[:, None]).argmin(axis=1)
    steps = np.arange(1, count)
    inner = np.maximum.accumulate(np.maximum(nearest, steps) - steps) + steps
    return np.concatenate([[0], np.minimum(inner, segments - count + steps), [segments]]).astype(np.int64)
