"""Splits that look at one number: layers, compute or memory; machines in the order in which they are given.

FusionLLM (arXiv 2410.12707) compares with equal numbers of operators and equal compute; the exact rules are not
published, and these are ours.
"""

from __future__ import annotations

import numpy as np

from fusionai.scheduling.baselines.one_chain import chain_plan, shares_to_bounds
from fusionai.scheduling.links import Indices
from fusionai.scheduling.swarm.task import SwarmTask
from fusionai.scheduling.swarm.work import Work, make_work
from fusionai.scheduling.swarm_plan import SwarmPlan


def equal_layers(task: SwarmTask) -> SwarmPlan:
    """Return one pipeline over all machines with as many segments each. Raises PlacementError when one is too small."""
    work = make_work(task)
    machines = _machines(work)
    return chain_plan(work, machines, shares_to_bounds(np.ones(work.count), np.ones(len(machines))))


def equal_compute(task: SwarmTask) -> SwarmPlan:
    """Return one pipeline over all machines with as many FLOPs each. Raises PlacementError when one is too small."""
    work = make_work(task)
    machines = _machines(work)
    flops = [sum(cost.forward_flops.values()) + sum(cost.backward_flops.values()) for cost in work.segments.costs]
    return chain_plan(work, machines, shares_to_bounds(np.asarray(flops, dtype=float), np.ones(len(machines))))


def memory_proportional(task: SwarmTask) -> SwarmPlan:
    """Return one pipeline over all machines, state bytes in proportion to memory. Raises PlacementError likewise."""
    work = make_work(task)
    machines = _machines(work)
    state = np.asarray([cost.training_bytes(1, task.optimizer_states) for cost in work.segments.costs], dtype=float)
    return chain_plan(work, machines, shares_to_bounds(state, work.budget_bytes[machines]))


def _machines(work: Work) -> Indices:
    """Return the first machines, no more than there are segments."""
    return work.task.candidates[: work.count]
