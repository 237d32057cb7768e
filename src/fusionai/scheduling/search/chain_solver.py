"""From groups of machines to selections of chains: quick for comparing many groupings, then properly for the best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fusionai.scheduling.links import Indices
from fusionai.scheduling.search.chain import (
    Chain,
    hops_of,
    measured,
    memory_does_not_bind,
    ordered,
    proportional,
    solved,
)
from fusionai.scheduling.search.chain_polish import polished
from fusionai.scheduling.search.grouping import Grouping
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.selection import Selection, selected

_TOLERANCE = 2e-3
_TOLERANCE_OF_MANY = 5e-2
"""How far the cuts of one chain may be from the best of an ideal pipeline, which is a guide only. A pool of many
machines has many chains to solve."""

_MANY_CHAINS = 16

_LOWER_LIMITS = (8, 3, 1)
"""Microbatches in flight for which cuts must leave room, tried where what 1F1B asks for leaves machines idle."""

_LOWER_LIMITS_POLISHED = (3, 1)
"""The same for chains that are polished afterwards, those without stages of the owner's."""

_NOTICED = 1.15
"""Microbatches in flight for each stage to go from which on the time on links is reckoned with."""

_GROWTH_OF_GUESSES = 2.0
"""From one number of pipelines tried to the next, where groupings are only compared."""

_BALANCED = 1.1
"""Over the time of work divided without loss: cuts within it are not sought for fewer microbatches in flight."""


@dataclass(slots=True)
class ChainSolver:
    """Cuts groups into chains; groups alike in machines and links are cut alike, and only once."""

    costs: SegmentCosts
    known: dict[tuple[bytes, ...], tuple[tuple[int, ...], Chain] | None] = field(default_factory=dict)

    def solve(
        self,
        machines: Indices,
        microbatches: int,
        sharing: float,
        tolerance: float,
        budget_share: float = 1.0,
        sum_s_per_byte: float = 0.0,
    ) -> Chain | None:
        """Return the best chain found for a group, by the fence's order and by one searched for; None if none fits."""
        costs = self.costs
        key = self._key(machines, microbatches, sharing, tolerance, budget_share, sum_s_per_byte)
        if key in self.known:
            return self._like(machines, self.known[key])
        orders = [machines]
        if not np.array_equal(other := ordered(costs, machines), machines):
            orders.append(other)
        best: Chain | None = None

        def seconds(chain: Chain) -> float:
            held = np.diff(costs.weights_P[list(chain.bounds)])
            return chain.seconds(microbatches) + sum_s_per_byte * float(held.max())

        ideal_s = 1 / float((1 / costs.whole_s[machines]).sum())
        lines = []
        for order in orders:
            line = costs.line(order, microbatches, sharing=sharing, sum_s_per_byte=sum_s_per_byte)
            lines.append(replace(line, budget_bytes_D=budget_share * line.budget_bytes_D))
        for limit, per_stage in self._held(machines, microbatches, sharing, ideal_s):
            for order, line in zip(orders, lines, strict=True):
                tried = replace(line, in_flight_limit=limit, in_flight_per_stage=per_stage)
                found = solved(costs, order, tried, sharing=sharing, tolerance=tolerance)
                if found is not None and (best is None or seconds(found) < seconds(best)):
                    best = found
            if best is not None and (
                memory_does_not_bind(costs, best) or seconds(best) < _BALANCED * microbatches * ideal_s
            ):
                break
        place = {int(machine): index for index, machine in enumerate(machines)}
        self.known[key] = None if best is None else (tuple(place[each] for each in best.machines), best)
        return best

    def polish(self, chain: Chain, microbatches: int, sum_s_per_byte: float) -> Chain:
        """Return a chain polished; chains alike in machines, links and cuts are polished alike, and only once."""
        machines = np.asarray(chain.machines)
        # A few microbatches more or less make no other chain better.
        rounds = max(1, round(microbatches, 1 - len(str(microbatches))))
        key = (b"polished", *self._key(machines, rounds, sum_s_per_byte, *chain.bounds))
        if key not in self.known:
            better = polished(self.costs, chain, rounds, sum_s_per_byte=sum_s_per_byte)
            place = {int(machine): index for index, machine in enumerate(machines)}
            self.known[key] = tuple(place[each] for each in better.machines), better
        found = self._like(machines, self.known[key])
        assert found is not None, "a polished chain is at least the chain itself"
        return found

    def _held(
        self, machines: Indices, microbatches: int, sharing: float, ideal_s: float
    ) -> Iterator[tuple[int, float]]:
        """Yield limits on microbatches in flight, and microbatches in flight for each stage to go, to cut for."""
        hop_s = hops_of(self.costs, machines, sharing)
        usable = hop_s[np.isfinite(hop_s) & (hop_s > 0)]
        away = 1 + float(np.median(usable)) / ideal_s if len(usable) else 1.0
        if away > _NOTICED:
            yield microbatches, away
        yield microbatches, 1.0
        limits = _LOWER_LIMITS if self.costs.problem.pinned else _LOWER_LIMITS_POLISHED
        yield from ((limit, 1.0) for limit in limits if limit < min(microbatches, len(machines)))

    def _key(self, machines: Indices, *numbers: float) -> tuple[bytes, ...]:
        costs, problem = self.costs, self.costs.problem
        around = machines if problem.owner_index is None else np.append(machines, problem.owner_index)
        return (
            costs.whole_s[machines].tobytes(),
            costs.budget_bytes[machines].tobytes(),
            problem.bandwidths(around[:, None], around[None]).tobytes(),
            problem.delays(around[:, None], around[None]).tobytes(),
            np.asarray(numbers).tobytes(),
        )

    def _like(self, machines: Indices, found: tuple[tuple[int, ...], Chain] | None) -> Chain | None:
        if found is None:
            return None
        places, chain = found
        return replace(chain, machines=tuple(int(machines[place]) for place in places))


def estimated(costs: SegmentCosts, grouping: Grouping, below_s: float = math.inf) -> Selection | None:
    """Return the selection of a grouping with cuts in proportion to speed; who cannot hold its part is left out.

    None if its step is not below `below_s`.
    """
    sharing = float(len(grouping.groups))
    limit = costs.problem.microbatches
    return selected(
        costs, proportional(costs, grouping.groups, sharing, limit), growth=_GROWTH_OF_GUESSES, below_s=below_s
    )


def refined(solver: ChainSolver, grouping: Grouping, estimate: Selection) -> Selection | None:
    """Return the selection of a grouping with the best cuts of each chain."""
    costs = solver.costs
    groups = {frozenset(group.tolist()): group for group in grouping.groups}
    chosen: Sequence[Indices] = grouping.groups
    if len(groups) > _MANY_CHAINS:
        taken = {machine for chain in estimate.chains for machine in chain.machines}
        chosen = [group for group in grouping.groups if not taken.isdisjoint(group.tolist())]
    tolerance = _TOLERANCE if len(chosen) <= _MANY_CHAINS else _TOLERANCE_OF_MANY
    speed = np.asarray([(1 / costs.whole_s[group]).sum() for group in chosen])
    shares = np.maximum(1, np.round(costs.problem.microbatches * speed / speed.sum())).astype(int)
    chains = []
    for group, share in zip(chosen, shares, strict=True):
        if chain := one_chain(solver, group, int(share), float(len(chosen)), tolerance, estimate.sum_s_per_byte):
            chains.append(chain)
    return selected(costs, chains)


def one_chain(
    solver: ChainSolver, group: Indices, microbatches: int, sharing: float, tolerance: float, sum_s_per_byte: float
) -> Chain | None:
    """Return a group's chain; a machine by itself needs no search."""
    costs = solver.costs
    if len(group) > 1:
        return solver.solve(group, microbatches, sharing, tolerance, sum_s_per_byte=sum_s_per_byte)
    last = costs.count
    alone = measured(costs, group, np.asarray([0, last]), sharing, costs.problem.microbatches)
    return alone if math.isfinite(alone.period_s) else None
