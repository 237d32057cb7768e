"""The search for the plan with which the steps left, and the moves before them, take least time.

Candidates come from the solver with moves in its objective (`candidates`), from the planner of fresh jobs, and from
both by small changes. Every one that counts is really cut and worked through as a schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypeAlias

import numpy as np

from fusionai.errors import PlacementError
from fusionai.graph.model import WeightKey
from fusionai.scheduling.estimator import flops_rate
from fusionai.scheduling.evaluation import Evaluated, evaluated_again, evaluated_one
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.one_pipeline import MOST_POSITIONS, best_pipeline, in_flight_limits
from fusionai.scheduling.search.one_pipeline_candidates import Placed, evaluated_split
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments, cut_positions
from fusionai.scheduling.search.sticky_splits import Weighing, exact, splits, weight_groups
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.transfers import Move, TransferSchedule, holders_of, loads_of, state_bytes

_MOST_POSITIONS = 64
"""Positions that the solver sees; small changes use all of them."""

_MOST_IDLE = 8
"""Fastest idle machines that are looked at, those of the fresh plan apart."""

_WEIGHING_WORK, _FEWEST_WEIGHED = 15_000, 8
"""Operators that may be cut to work the solver's best splits through as schedules; no fewer splits than this."""

_MOST_IMPROVED = 3
"""Best candidates that are improved by small changes."""

_IMPROVING_WORK = 100_000
"""Operators that may be cut again, and ten times the passes that may be worked through: a second or two."""

_SHIFTS = (-1, 1, -2, 2, -3, 3, -5, 5)
"""Positions by which cuts are shifted."""

_ALIKE = 0.02
"""Machines whose speeds differ by less are one another's equal."""

_CORRECTIONS = 3
"""How often the solver is told that a machine holds less than it reckoned with."""


@dataclass(frozen=True, slots=True)
class Option:
    """A plan for the steps left."""

    evaluated: Evaluated
    moves: tuple[Move, ...]
    move_s: float
    total_s: float
    """Seconds of the moves and of all steps left."""


Way: TypeAlias = tuple[list[int], list[str]]
"""A pipeline without the owner's stages: the cuts between its stages, and the peers that run them."""


class Search:
    """One search. The machines of `running`, the plan that runs, are those of `problem` as far as they stay."""

    def __init__(self, problem: TrainingProblem, running: Plan, steps_left: int) -> None:
        self._problem, self._steps_left = problem, steps_left
        self._compnodes = problem.limits.compnodes
        self._transfers = TransferSchedule(problem)
        self._nbytes = state_bytes(problem.graph, problem.sizes, problem.optimizer_states)
        self._plan = running
        holds: dict[str, set[WeightKey]] = {}
        stages = problem.costs.cut(problem.graph, problem.sizes, running.cuts).stages
        for held, stage in zip(stages, running.stages, strict=True):
            holds.setdefault(stage.peer, set()).update(held.keys)
        self._before = holders_of(holds)
        self._running = self._way(running.cuts, [stage.peer for stage in running.stages])
        self._numbers = {problem.machines[number].peer: int(number) for number in problem.candidates}
        self._positions = sorted({*cut_positions(problem, MOST_POSITIONS), *self._running[0]})
        self._tried: dict[tuple[tuple[int, ...], tuple[str, ...]], Option | None] = {}
        self._work = _IMPROVING_WORK

    def _way(self, cuts: Sequence[int], peers: Sequence[str]) -> Way:
        """Return a pipeline without what is pinned to the owner's machine."""
        problem = self._problem
        first, stop = int(problem.front > 0), len(peers) - int(problem.back < len(problem.graph.nodes))
        return [position for position in cuts if problem.front < position < problem.back], list(peers[first:stop])

    def _way_of(self, option: Option) -> Way:
        choice = option.evaluated.pipelines[0].choice
        return self._way(choice.cuts, self._problem.peers(choice.machines))

    # --- options ----------------------------------------------------------------------------------------------------

    def kept(self) -> Option | None:
        """Return the running plan as an option; None when a machine of it has left, or is to go."""
        gone = self._problem.limits.leaving
        if any(stage.peer in gone or stage.peer not in self._problem.number_of for stage in self._plan.stages):
            return None
        return self._option(evaluated_again(self._problem, self._plan))

    def _option(self, evaluated: Evaluated) -> Option:
        moves = self._transfers.moves(self._before, evaluated.holds, self._nbytes)
        move_s = self._transfers.moves_s(loads_of(moves))
        return Option(evaluated, moves, move_s, move_s + self._steps_left * evaluated.step_s)

    def _try(self, inner: Sequence[int], peers: Sequence[str]) -> Option | None:
        """Return the option of cuts and machines without the owner's; None when it is not allowed or does not fit."""
        key = tuple(inner), tuple(peers)
        if key not in self._tried:
            self._tried[key] = self._worked(inner, peers) if self._allowed(peers) else None
        return self._tried[key]

    def _allowed(self, peers: Sequence[str]) -> bool:
        if not peers or len(set(peers)) < len(peers) or any(peer not in self._numbers for peer in peers):
            return False
        if self._compnodes and len(peers) != self._compnodes:
            return False
        return all(self._problem.reachable(self._numbers[one], self._numbers[other]) for one, other in pairwise(peers))

    def _worked(self, inner: Sequence[int], peers: Sequence[str]) -> Option | None:
        problem = self._problem
        whole, machines = self._whole(inner, [self._numbers[peer] for peer in peers])
        for limit in in_flight_limits(problem.microbatches, len(machines)):
            self._work -= len(problem.graph.nodes) + 10 * problem.microbatches * len(machines)
            evaluated = evaluated_one(problem, whole, machines, limit)
            if evaluated.possible:
                return self._option(evaluated)
        return None

    def _whole(self, inner: Sequence[int], machines: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return cuts and machines with the owner's stages added."""
        problem, last, everyone = self._problem, len(self._problem.graph.nodes), list(machines)
        if problem.owner_index is not None:
            everyone = [
                *[problem.owner_index] * (problem.front > 0),
                *everyone,
                *[problem.owner_index] * (problem.back < last),
            ]
        return [position for position in (problem.front, *inner, problem.back) if 0 < position < last], everyone

    # --- the search -------------------------------------------------------------------------------------------------

    def best(self) -> Option:
        """Return the best option found.

        Raises:
            PlacementError: no plan meets the constraints.
        """
        fresh, failure = None, None
        try:
            # What a new job would get.
            fresh = self._option(best_pipeline(self._problem))
        except PlacementError as error:
            failure = error
        found = {} if fresh is None else {self._key(fresh): fresh}
        ways = [self._running, *([self._way_of(fresh)] if fresh else [])]
        for way in ways:
            for peers in self._holders_first(way):
                self._add(found, self._try(way[0], peers))
        for inner, peers in self._solved(ways):
            self._add(found, self._try(inner, peers))
        if not found:
            assert failure is not None
            raise failure
        self._work = _IMPROVING_WORK
        starts = sorted(found.values(), key=lambda each: each.total_s)[:_MOST_IMPROVED]
        return min((self._improved(each) for each in starts), key=lambda each: each.total_s)

    def _key(self, option: Option) -> tuple[tuple[int, ...], tuple[str, ...]]:
        choice = option.evaluated.pipelines[0].choice
        return choice.cuts, tuple(self._problem.peers(choice.machines))

    def _add(self, found: dict[tuple[tuple[int, ...], tuple[str, ...]], Option], option: Option | None) -> None:
        if option is not None:
            found.setdefault(self._key(option), option)

    def _holders_first(self, way: Way) -> Iterator[list[str]]:
        """Yield a pipeline's machines, and with its stages given to machines that are alike so that few bytes move."""
        inner, peers = way
        yield peers
        if any(peer not in self._numbers for peer in peers):
            return
        problem = self._problem
        whole, _ = self._whole(inner, [])
        first = int(problem.front > 0)
        stages = problem.costs.cut(problem.graph, problem.sizes, whole).stages[first : first + len(peers)]
        held = {
            (place, peer): sum(self._nbytes[key] for key in stage.keys if peer in self._before[key])
            for place, stage in enumerate(stages)
            for peer in self._numbers
        }
        assigned: dict[int, str] = {}
        for (place, peer), nbytes in sorted(held.items(), key=lambda item: -item[1]):
            free = place not in assigned and peer not in assigned.values()
            if nbytes and free and self._alike(peer, peers[place]):
                assigned[place] = peer
        for place, own in enumerate(peers):
            if place not in assigned:
                free_ones = [each for each in self._numbers if each not in assigned.values()]
                alike = [each for each in free_ones if each == own or self._alike(each, own)]
                if not alike:
                    return
                assigned[place] = own if own in alike else alike[0]
        yield [assigned[place] for place in range(len(peers))]

    def _alike(self, one: str, other: str) -> bool:
        """Whether two machines compute about equally fast and the first holds no less."""
        devices = [self._problem.member(peer).device for peer in (one, other)]
        rates = [flops_rate(each, "matmul", self._problem.precision) for each in devices]
        return devices[0].memory_bytes >= devices[1].memory_bytes and abs(rates[0] / rates[1] - 1) < _ALIKE

    def _solved(self, ways: Sequence[Way]) -> Iterator[Way]:
        """Yield pipelines that the solver finds, best first; `ways` are to be among what it sees."""
        peers = self._looked_at(ways)
        machines = np.asarray([self._numbers[peer] for peer in peers], dtype=np.int64)
        costs = costs_in_segments(self._problem, self._seen_positions(ways))
        counts = [self._compnodes] if self._compnodes else list(range(1, len(peers) + 1))
        budgets = costs.budget_bytes[machines]
        groups = weight_groups(costs, self._before, self._nbytes)
        most = max(_FEWEST_WEIGHED, _WEIGHING_WORK // len(self._problem.graph.nodes))
        microbatches = self._problem.microbatches
        for limit in in_flight_limits(microbatches, len(peers) + len(costs.segments.outer)):
            for _ in range(1 + _CORRECTIONS):
                line = costs.line(machines, microbatches, budget_bytes=budgets, in_flight_limit=limit)
                weighing = Weighing(line, groups, peers, self._transfers, self._steps_left)
                placed = splits(weighing, counts, self._orders(ways, peers))
                ranked = _ranked(weighing, placed, most)
                named = [
                    ([costs.positions[bound] for bound in bounds[1:-1]], [peers[device] for device in devices])
                    for devices, bounds in ranked
                ]
                if any(self._try(*each) for each in named):
                    yield from named
                    if not exact(line):
                        return
                    # With fewer in flight more splits fit, slower ones by themselves but maybe with less to move.
                    break
                if not self._shrunk(costs, machines, budgets, ranked, limit):
                    break

    def _looked_at(self, ways: Sequence[Way]) -> list[str]:
        """Return the peers of the ways, and the fastest others."""
        used = {peer for _, peers in ways for peer in peers}
        idle = [peer for peer in self._numbers if peer not in used]
        precision = self._problem.precision
        idle.sort(key=lambda peer: -flops_rate(self._problem.member(peer).device, "matmul", precision))
        return [*(peer for peer in self._numbers if peer in used), *idle[:_MOST_IDLE]]

    def _seen_positions(self, ways: Sequence[Way]) -> list[int]:
        every = len(self._positions) / _MOST_POSITIONS
        thinned = self._positions if every <= 1 else [self._positions[int(k * every)] for k in range(_MOST_POSITIONS)]
        cuts = [position for inner, _ in ways for position in inner]
        return sorted({self._problem.front, *thinned, *cuts, self._problem.back})

    def _orders(self, ways: Sequence[Way], peers: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the orders of machines to begin with; where one has left also with each idle one in its place."""
        place = {peer: index for index, peer in enumerate(peers)}
        found = []
        for _, middle in ways:
            found.append(tuple(place[peer] for peer in middle if peer in place))
            gone = [index for index, peer in enumerate(middle) if peer not in place]
            if len(gone) == 1:
                for idle in place.keys() - set(middle):
                    filled = [idle if peer not in place else peer for peer in middle]
                    found.append(tuple(place[peer] for peer in filled))
        return sorted(set(found))

    def _shrunk(
        self, costs: SegmentCosts, machines: Indices, budgets: Floats, ranked: Sequence[Placed], limit: int
    ) -> bool:
        """Lower the budgets of machines for which the solver's sums were too low; whether any were."""
        place, shrunk = {int(machine): index for index, machine in enumerate(machines)}, False
        for devices, bounds in ranked:
            placed = tuple(machines[list(devices)].tolist()), bounds
            for machine, share in evaluated_split(costs, placed, limit).overloaded.items():
                if machine in place:
                    offered = self._problem.machines[machine].device.memory_bytes / MEMORY_MARGIN
                    budgets[place[machine]] = min(budgets[place[machine]], share * offered)
                    shrunk = True
        return shrunk

    # --- small changes ----------------------------------------------------------------------------------------------

    def _improved(self, best: Option) -> Option:
        """Change what brings an option down, until nothing does or the work is done."""
        improved = True
        while improved:
            improved = False
            for inner, peers in self._neighbours(self._way_of(best)):
                if self._work <= 0:
                    return best
                tried = self._try(inner, peers)
                if tried is not None and tried.total_s < best.total_s * (1 - 1e-9):
                    best, improved = tried, True
                    break
        return best

    def _neighbours(self, way: Way) -> Iterator[Way]:
        """Yield a pipeline with cuts shifted, machines swapped, and one machine replaced, left out or added."""
        inner, peers = way
        place = {position: index for index, position in enumerate(self._positions)}
        runs = [(start, stop) for width in (1, 2) for start, stop in _runs(len(inner), width)]
        for by in _SHIFTS:
            for start, stop in runs:
                indices = [place[each] + (by if start <= k < stop else 0) for k, each in enumerate(inner)]
                bounded = [0, *indices, len(self._positions) - 1]
                if all(one < other for one, other in pairwise(bounded)):
                    yield [self._positions[index] for index in indices], peers
        for first, second in combinations(range(len(peers)), 2):
            swapped = list(peers)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            yield inner, swapped
        idle = [peer for peer in self._numbers if peer not in peers]
        for stage, peer in enumerate(peers):
            for spare in idle:
                yield inner, [*peers[:stage], spare, *peers[stage + 1 :]]
            fewer = [*peers[:stage], *peers[stage + 1 :]]
            for gone in {max(stage - 1, 0), min(stage, len(inner) - 1)} if inner else ():
                yield [*inner[:gone], *inner[gone + 1 :]], fewer
            ends = [0, *(place[each] for each in inner), len(self._positions) - 1]
            start, stop = ends[stage : stage + 2]
            for middle in sorted({start + 1, (start + stop) // 2, stop - 1}):
                if start < middle < stop:
                    cuts = [*inner[:stage], self._positions[middle], *inner[stage:]]
                    for spare in idle:
                        yield cuts, [*peers[:stage], spare, peer, *peers[stage + 1 :]]
                        yield cuts, [*peers[:stage], peer, spare, *peers[stage + 1 :]]


def _ranked(weighing: Weighing, placed: Collection[Placed], most: int) -> list[Placed]:
    """Return the best splits for the steps left, and those for few steps: the solver may err by what parts them."""

    def best_for(steps: int) -> list[Placed]:
        return sorted(placed, key=lambda each: (weighing.seconds(each, steps), each))

    few, all_left = best_for(weighing.few_steps), best_for(weighing.steps_left)
    found = dict.fromkeys([*all_left[: most - most // 3], *few[: most // 3], *all_left[:most]])
    return list(found)[:most]


def _runs(count: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of `width` among `count`."""
    for start in range(count - width + 1):
        yield start, start + width
