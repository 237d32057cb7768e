"""Splits that look at one number: layers, compute or memory.

FusionLLM (arXiv 2410.12707) compares with equal numbers of operators and equal compute; the exact rules are not
published, and these are ours. The planners here are one pipeline over all machines in the order in which they are
given. `cheapest_prefix` and `cut_again` give the same cuts what the planner decides besides cuts: how many
machines, and which pipelines of which machines in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from contenders.planners.one_chain import chain_outcome, chain_plan, chain_run, shares_to_bounds
from fusionai.scheduling.evaluation import Evaluated
from fusionai.scheduling.links import Indices
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.chain import Chain, measured
from fusionai.scheduling.search.clusters import clustered
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.worked_chains import evaluated_chains

Rule = Callable[[SegmentCosts, Indices], Indices]
"""From machines in their order to the bounds of their stages, in segments."""

_WORKED_THROUGH = 6
"""Prefixes whose schedules are worked through: those that are fastest as ideal pipelines."""


def by_layers(work: SegmentCosts, machines: Indices) -> Indices:
    """Return bounds that give each machine as many segments."""
    return shares_to_bounds(np.ones(work.count), np.ones(len(machines)))


def by_compute(work: SegmentCosts, machines: Indices) -> Indices:
    """Return bounds that give each machine as many FLOPs."""
    flops = [sum(cost.forward_flops.values()) + sum(cost.backward_flops.values()) for cost in work.segments.costs]
    return shares_to_bounds(np.asarray(flops, dtype=float), np.ones(len(machines)))


def by_memory(work: SegmentCosts, machines: Indices) -> Indices:
    """Return bounds that give each machine state bytes in proportion to its memory."""
    states = work.problem.optimizer_states
    state = np.asarray([cost.training_bytes(1, states) for cost in work.segments.costs], dtype=float)
    return shares_to_bounds(state, work.budget_bytes[machines])


RULES: Mapping[str, Rule] = MappingProxyType(
    {"equal_layers": by_layers, "equal_compute": by_compute, "memory_proportional": by_memory}
)


def equal_layers(task: TrainingProblem) -> Plan:
    """Return one pipeline over all machines with as many segments each. Raises PlacementError when one is too small."""
    return _over_all(task, by_layers)


def equal_compute(task: TrainingProblem) -> Plan:
    """Return one pipeline over all machines with as many FLOPs each. Raises PlacementError when one is too small."""
    return _over_all(task, by_compute)


def memory_proportional(task: TrainingProblem) -> Plan:
    """Return one pipeline over all machines, state bytes in proportion to memory. Raises PlacementError likewise."""
    return _over_all(task, by_memory)


def _over_all(task: TrainingProblem, rule: Rule) -> Plan:
    work = costs_in_segments(task)
    machines = task.candidates[: work.count]
    return chain_plan(work, machines, rule(work, machines))


def cheapest_prefix(work: SegmentCosts, rule: Rule) -> Evaluated | None:
    """Return a rule's best pipeline of the k fastest machines, of the pool or of one cluster, over all k.

    Machines run in the order of their speed, or in that in which they are given, whichever is better.
    """
    scopes = [work.problem.candidates, *clustered(work.problem, work.problem.candidates)]
    found: dict[tuple[int, ...], Chain] = {}
    for scope in scopes:
        by_speed = scope[np.argsort(work.whole_s[scope], kind="stable")]
        for count in range(1, min(len(scope), work.count) + 1):
            for machines in (by_speed[:count], np.sort(by_speed[:count])):
                if (key := tuple(machines.tolist())) not in found:
                    found[key] = _roughly(work, machines, rule(work, machines))
    ranked = sorted(found.values(), key=lambda chain: chain.seconds(work.problem.microbatches))
    outcomes: list[Evaluated] = []
    for chain in ranked:
        if len(outcomes) == _WORKED_THROUGH:
            break
        if (made := chain_outcome(work, np.asarray(chain.machines), np.asarray(chain.bounds))) is not None:
            outcomes.append(made)
    return min(outcomes, key=lambda each: each.step_s, default=None)


def _roughly(work: SegmentCosts, machines: Indices, bounds: Indices) -> Chain:
    return measured(work, machines, bounds, 1.0, work.problem.microbatches)


def cut_again(work: SegmentCosts, plan: Plan, rule: Rule) -> Evaluated | None:
    """Return a plan's pipelines, their machines, order and microbatches, with a rule's cuts; None if one is too large.

    For jobs without stages of the owner's.
    """
    number = {each.peer: index for index, each in enumerate(work.problem.machines)}
    runs = []
    for pipeline in plan.pipelines:
        machines = np.asarray([number[stage.peer] for stage in pipeline.stages])
        if (made := chain_run(work, machines, rule(work, machines), pipeline.microbatches)) is None:
            return None
        runs.append(made)
    return evaluated_chains(work, runs)
