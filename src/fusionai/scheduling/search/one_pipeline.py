"""The search for plans of one pipeline.

Cuts and compnodes are chosen together so that an ideal pipeline's step is shortest (`partition`), within everybody's
memory and with the owner's share pinned. The best few splits are then really cut and their schedules worked through
(`evaluation`), and the fastest is the plan.

Left to themselves, stages hold as many microbatches as 1F1B asks for. If that does not fit anywhere, the limit is
lowered step by step to one: slower, but the model trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fusionai.errors import ConfigError, PlacementError
from fusionai.scheduling.evaluation import Evaluated
from fusionai.scheduling.links import Indices
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.one_pipeline_candidates import (
    Placed,
    as_given,
    each_alone,
    evaluated_split,
    linked_chains,
    solver_splits,
)
from fusionai.scheduling.search.plan_polish import polished
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments, cut_positions
from fusionai.scheduling.shortage import nothing_fits, owner_too_small, too_few

MOST_POSITIONS = 160
"""More cut points than this are thinned out: the solver's tables grow with their square."""

_MOST_POLISHED = 3
"""Best candidates that are polished."""

_MATTERS = 0.02
"""Share of a step that the way to the farthest machine must take for plans without it to be sought."""


def best_pipeline(problem: TrainingProblem) -> Evaluated:
    """Return the fastest single pipeline found.

    Raises PlacementError with what is missing when none meets the constraints, and ConfigError for `limits.cuts` that
    do not suit the graph.
    """
    machines = problem.candidates
    counts = _counts(problem, len(machines))
    costs = costs_in_segments(problem, _positions(problem))
    if problem.limits.in_order and (problem.limits.cuts is None or len(machines) != costs.count):
        raise PlacementError(
            f"{len(machines)} compnodes that can be linked with the owner's machine are to take {costs.count} "
            "shares in their order; make placement.machines and placement.cuts agree"
        )
    best, owner_failure = _fastest(costs, machines, counts)
    nearer = machines
    while best is not None and not problem.limits.in_order:
        # The solver does not see that the step's end waits for whoever is farthest from its driver.
        nearer = _nearer(best, nearer)
        if len(nearer) < min(counts):
            break
        tried, _ = _fastest(costs, nearer, [count for count in counts if count <= len(nearer)])
        if tried is None or tried.step_s >= best.step_s:
            break
        best = tried
    if best is not None:
        return best
    if owner_failure is not None and problem.owner is not None and problem.owner_index is not None:
        raise owner_too_small(problem.owner, owner_failure.needs_bytes[problem.owner_index])
    raise nothing_fits(
        costs.segments,
        [problem.machines[machine] for machine in machines],
        fewest=min(counts),
        most=max(counts),
        optimizer_states=problem.optimizer_states,
        remedies=problem.remedies,
    )


def _fastest(
    costs: SegmentCosts, machines: Indices, counts: Sequence[int]
) -> tuple[Evaluated | None, Evaluated | None]:
    """Return the fastest pipeline found, and else one for which the owner's machine is too small, if that is so."""
    problem = costs.problem
    limits = problem.limits
    apart: list[Placed] = [] if limits.cuts is not None else linked_chains(costs, machines, counts)
    if 1 in counts and not limits.in_order:
        apart += each_alone(costs, machines)
    owner_failure: Evaluated | None = None
    for limit in in_flight_limits(problem.microbatches, max(counts) + len(costs.segments.outer)):
        if limits.in_order:
            fitting, too_large = as_given(costs, machines, limit)
        else:
            fitting, too_large = solver_splits(costs, machines, counts, limit)
        others = [evaluated_split(costs, placed, limit) for placed in apart]
        fitting += [each for each in others if each.possible]
        if fitting:
            # Polishing ends in a local minimum: where it starts matters.
            fitting = sorted(fitting, key=lambda each: each.step_s)[:_MOST_POLISHED]
            if not limits.in_order:
                fitting = [polished(costs, each, limit) for each in fitting]
            return min(fitting, key=lambda each: each.step_s), None
        owner_failure = too_large or owner_failure
    return None, owner_failure


def _nearer(best: Evaluated, machines: Indices) -> Indices:
    """Return the machines nearer to the owner's than the farthest of a pipeline; none if that matters little."""
    problem = best.problem
    if problem.owner_index is None:
        return machines[:0]
    away_s = 2 * problem.delays(np.full(len(machines), problem.owner_index), machines)
    used = np.isin(machines, best.pipelines[0].choice.machines)
    farthest_s = float(away_s[used].max(initial=0.0))
    if farthest_s < _MATTERS * best.step_s:
        return machines[:0]
    return machines[away_s < farthest_s]


def _counts(problem: TrainingProblem, candidates: int) -> list[int]:
    """Return the numbers of compnodes to consider."""
    limits = problem.limits
    wanted = len(limits.cuts) + 1 if limits.cuts is not None else limits.compnodes
    if wanted > candidates:
        raise too_few(wanted, candidates, problem.remedies)
    return [wanted] if wanted else list(range(1, candidates + 1))


def _positions(problem: TrainingProblem) -> list[int]:
    """Return the node positions considered, the ends of what may be distributed included."""
    if (cuts := problem.limits.cuts) is None:
        return cut_positions(problem, MOST_POSITIONS)
    positions = [problem.front, *cuts, problem.back]
    if any(early >= late for early, late in pairwise(positions)):
        raise ConfigError(
            f"placement.cuts must rise strictly between {problem.front} and {problem.back}, the operators that may be "
            f"distributed, and is {list(cuts)}"
        )
    return positions


def in_flight_limits(microbatches: int, stages: int) -> list[int]:
    """Return the in-flight limits to try: none, then ever lower ones."""
    limits, limit = [microbatches], min(microbatches, stages) - 1
    while limit >= 1:
        limits.append(limit)
        limit = limit // 2 if limit > 1 else 0
    return limits
