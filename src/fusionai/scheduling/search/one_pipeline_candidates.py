"""Single pipelines that are worth working through: those of the solver, and others that it does not see as good.

The solver reckons with an ideal pipeline: what ends the step, and how far the driver is away, it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import TypeAlias

from fusionai.scheduling.evaluation import Evaluated, evaluate
from fusionai.scheduling.links import Indices
from fusionai.scheduling.partition import Line, Split, best_of_order, frontier, split
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.single_chains import best_single_chains
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.worked_pipeline import worked_through

Placed: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Machines in their order, the owner's stages apart, and the bounds of their stages as indices of positions."""

_FEW_MICROBATCHES = 16
"""Up to so many, what the last microbatch leaves to compute matters, and candidates are sought with it and without."""

_FEW_MEMBERS = 6
"""Up to so many every set and order is looked at in any case (`partition`)."""

_FEW_MACHINES = 3
"""With few microbatches and so few compnodes the best split of each order is worked through: of ideal pipelines that
are about equally fast, schedules differ."""

_TOLERANCE_OF_ORDERS = 5e-3

_CORRECTIONS = 3
"""How often the solver is told that a machine holds less than it reckoned with."""

_EXCHANGES, _EXCHANGES_OF_MANY = 40, 5
"""Orders of machines that are tried from the best one found, with few members and with many."""

_MOST_ALONE = 32
"""Kinds of machines that are looked at alone."""


def solver_splits(
    costs: SegmentCosts, machines: Indices, counts: Sequence[int], limit: int
) -> tuple[list[Evaluated], Evaluated | None]:
    """Return evaluated splits of the solver that fit, and else one that the owner's machine is too small for."""
    problem = costs.problem
    budgets = costs.budget_bytes[machines].copy()
    place = {int(machine): index for index, machine in enumerate(machines)}
    owner_failure: Evaluated | None = None
    # Where chains follow the links, exchanges by speed found nothing better in any of twenty random pools.
    exchanges = _EXCHANGES if len(machines) <= _FEW_MEMBERS else _EXCHANGES_OF_MANY
    for _ in range(1 + _CORRECTIONS):
        found: set[Placed] = set()
        for hide_deferred in _hidings(costs):
            line = costs.line(
                machines,
                problem.microbatches,
                budget_bytes=budgets,
                in_flight_limit=limit,
                hide_deferred=hide_deferred,
            )
            splits = split(line, counts, exchanges=exchanges)
            if problem.microbatches <= _FEW_MICROBATCHES and len(machines) <= _FEW_MACHINES:
                splits += _best_of_orders(line, counts)
            found |= {(tuple(machines[list(each.devices)].tolist()), each.bounds) for each in splits}
        tried = [evaluated_split(costs, each, limit) for each in sorted(found)]
        if fitting := [each for each in tried if each.possible]:
            return fitting, None
        shrunk = False
        for each in tried:
            if problem.pinned and problem.owner_index in each.overloaded:
                owner_failure = each
            for machine, share in each.overloaded.items():
                if machine in place:
                    # The sums over segments were too low by this share.
                    offered = problem.machines[machine].device.memory_bytes / MEMORY_MARGIN
                    budgets[place[machine]] = min(budgets[place[machine]], share * offered)
                    shrunk = True
        if not shrunk:
            break
    return [], owner_failure


def as_given(costs: SegmentCosts, machines: Indices, limit: int) -> tuple[list[Evaluated], Evaluated | None]:
    """Return the pipeline that gives each machine one segment, in their order; see `solver_splits`."""
    made = evaluated_split(costs, (tuple(machines.tolist()), tuple(range(len(machines) + 1))), limit)
    owner_failed = costs.problem.pinned and costs.problem.owner_index in made.overloaded
    return ([made] if made.possible else []), made if owner_failed else None


def each_alone(costs: SegmentCosts, machines: Indices) -> list[Placed]:
    """Return each kind of machine with everything that may be distributed.

    Machines are of one kind whose rates, memory, and links with the owner's machine are the same.
    """
    problem = costs.problem
    owner = problem.owner_index
    kinds: dict[object, int] = {}
    for machine in machines.tolist():
        device = problem.machines[machine].device
        rates = *sorted(device.flops_per_s.items()), device.memory_bytes_per_s, device.overhead_s
        ends = () if owner is None else (problem.link(owner, machine), problem.link(machine, owner))
        lines = () if problem.lines is None else tuple(float(each[machine]) for each in problem.lines)
        kinds.setdefault((rates, device.memory_bytes, device.update_bytes_per_s, *ends, lines), machine)
    return [((machine,), (0, costs.count)) for machine in list(kinds.values())[:_MOST_ALONE]]


def linked_chains(costs: SegmentCosts, machines: Indices, counts: Sequence[int]) -> list[Placed]:
    """Return chains that follow the links; the solver's search goes by speed first."""
    if len(machines) <= _FEW_MEMBERS:
        return []
    return [
        (chain.machines, chain.bounds) for chain in best_single_chains(costs, machines) if len(chain.machines) in counts
    ]


def _best_of_orders(line: Line, counts: Sequence[int]) -> Iterator[Split]:
    """Yield the best split of each order of devices."""
    for count in counts:
        for order in permutations(range(line.devices), count):
            splits = frontier(line, partial(best_of_order, line, order), _TOLERANCE_OF_ORDERS)
            if (best := min(splits, key=lambda each: each.objective_s(line.microbatches), default=None)) is not None:
                yield best


def _hidings(costs: SegmentCosts) -> tuple[bool, ...]:
    """Return for which of the solver's numbers to search (`SegmentCosts.line`)."""
    if not costs.problem.split_backward:
        return (False,)
    return (True, False) if costs.problem.microbatches <= _FEW_MICROBATCHES else (True,)


def evaluated_split(costs: SegmentCosts, placed: Placed, limit: int) -> Evaluated:
    """Add the owner's stages to machines and bounds, and evaluate the pipeline."""
    problem = costs.problem
    rounds = problem.microbatches
    return evaluate(problem, [worked_through(problem, costs.choice(*placed, rounds, limit, rounds))])
