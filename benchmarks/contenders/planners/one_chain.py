"""A single pipeline with given machines and cuts: what the simple baselines have in common."""

from __future__ import annotations

import numpy as np

from fusionai.errors import PlacementError
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.swarm.chain import measured
from fusionai.scheduling.swarm.outcome import Outcome, outcome, owner_need_bytes, swarm_plan
from fusionai.scheduling.swarm.running import Running, run
from fusionai.scheduling.swarm.work import Work
from fusionai.scheduling.swarm_plan import SwarmPlan

_LIMITS = (8, 3, 1)


def chain_plan(work: Work, machines: Indices, bounds: Indices) -> SwarmPlan:
    """Return the plan of one pipeline, fewer microbatches in flight where memory asks for it.

    Raises PlacementError when it does not fit, or neighbours cannot be linked.
    """
    if (found := chain_outcome(work, machines, bounds)) is not None:
        return swarm_plan(work, found)
    raise PlacementError(
        f"this split over {len(machines)} machines in a fixed order does not fit: a stage is larger than its machine's "
        "memory, or two neighbours cannot be linked; use the planner, which looks at both"
    )


def chain_outcome(work: Work, machines: Indices, bounds: Indices) -> Outcome | None:
    """Return what one pipeline makes of a step; None when it does not fit, or neighbours cannot be linked."""
    if (found := chain_run(work, machines, bounds, work.task.microbatches)) is None:
        return None
    owner = work.task.owner
    fits = owner is None or owner_need_bytes(work, [found]) <= owner.device.memory_bytes
    return outcome(work, [found]) if fits else None


def chain_run(work: Work, machines: Indices, bounds: Indices, microbatches: int) -> Running | None:
    """Return the schedule of a pipeline that takes some of a step's microbatches; None when it does not fit."""
    owner = work.task.owner
    for limit in (microbatches, *_LIMITS):
        found = run(work, measured(work, machines, bounds, 1.0, limit), microbatches)
        fits = owner is None or owner_need_bytes(work, [found]) <= owner.device.memory_bytes
        if found.possible and fits:
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
