"""Orders of machines by a genetic search, as in DT-FM; every machine takes part with an equal share.

Yuan et al., "Decentralized Training of Foundation Models in Heterogeneous Environments" (arXiv 2206.01288) search
layouts of equal stages by an evolutionary algorithm on communication alone. Here layouts are orders of one pipeline;
their grid of data parallelism is left out.
"""

from __future__ import annotations

import numpy as np

from contenders.planners.one_chain import chain_plan, shares_to_bounds
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.segment_tables import costs_in_segments

_POPULATION = 32
_GENERATIONS = 200
_SEED = 0


def genetic_order(task: TrainingProblem) -> Plan:
    """Return one pipeline of equal compute in the order of least communication that a genetic search finds.

    Raises PlacementError when a machine is too small for its share.
    """
    work = costs_in_segments(task)
    machines = task.candidates[: work.count]
    typical = (
        np.asarray([np.median(work.segments.forward_bytes_P)]),
        np.asarray([np.median(work.segments.gradient_bytes_P)]),
    )
    hop = np.nan_to_num(np.minimum(work.hops(machines, typical, 1.0)[0][:, :, 0], 1e9))
    order = machines[_searched(hop, len(machines))]
    flops = [sum(cost.forward_flops.values()) + sum(cost.backward_flops.values()) for cost in work.segments.costs]
    return chain_plan(work, order, shares_to_bounds(np.asarray(flops, dtype=float), np.ones(len(order))))


def _searched(hop_EE: Floats, count: int) -> Indices:
    random = np.random.default_rng(_SEED)

    def cost(order: Indices) -> float:
        path = np.concatenate([[count], order, [count]])
        return float(hop_EE[path[:-1], path[1:]].sum())

    population = [np.arange(count), *(random.permutation(count) for _ in range(_POPULATION - 1))]
    costs = [cost(each) for each in population]
    for _ in range(_GENERATIONS if count > 1 else 0):
        one, other = (population[int(each)] for each in random.choice(len(population), 2, replace=False))
        child = _crossed(one, other, random)
        first, second = random.integers(count, size=2)
        child[[first, second]] = child[[second, first]]
        worst = int(np.argmax(costs))
        if (new := cost(child)) < costs[worst]:
            population[worst], costs[worst] = child, new
    return population[int(np.argmin(costs))]


def _crossed(one: Indices, other: Indices, random: np.random.Generator) -> Indices:
    """Return a stretch of one order, then the rest as the other order has it (order crossover)."""
    start, stop = np.sort(random.integers(len(one) + 1, size=2))
    kept = one[start:stop]
    return np.concatenate([kept, other[~np.isin(other, kept)]])
