"""The search for the plan with which the steps left, and the moves before them, take least time.

Candidates come from the solver with moves in its objective (`candidates`), from the planner of fresh jobs, and from
both by small changes. Every one that counts is really cut and worked through as a schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from fusionai.errors import PlacementError
from fusionai.graph.cuts import cut
from fusionai.graph.model import WeightKey
from fusionai.scheduling.estimator import flops_rate
from fusionai.scheduling.evaluation import Evaluated, Task, evaluate, evaluate_again
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.planner import cut_positions, in_flight_limits, plan_training
from fusionai.scheduling.profile import Member
from fusionai.scheduling.segments import MEMORY_MARGIN, Segments, make_line, make_segments, reachable
from fusionai.scheduling.sticky.candidates import Placed, Weighing, exact, splits, weight_groups
from fusionai.scheduling.sticky.moves import Haulage, Move, holders_of, loads_of, state_bytes

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

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.evaluated.plan


class Search:
    """One search; `running` is the plan that runs, its machines those of `task` as far as they stay.

    `haulage` knows all that can hand something on, also machines that `task` may not use any more.
    """

    def __init__(self, task: Task, running: Plan, steps_left: int, compnodes: int, haulage: Haulage) -> None:
        self._task, self._running, self._steps_left, self._compnodes = task, running, steps_left, compnodes
        self._haulage = haulage
        self._nbytes = state_bytes(task.graph, task.sizes, task.optimizer_states)
        holds: dict[str, set[WeightKey]] = {}
        for subdag, stage in zip(cut(task.graph, running.cuts), running.stages, strict=True):
            holds.setdefault(stage.peer, set()).update(weight.key for weight in subdag.weights)
        self._before = holders_of(holds)
        self._members = {each.peer: each for each in task.pool.members if reachable(each, task.owner)}
        self._positions = sorted({*cut_positions(task, None), *self._inner(running.cuts)})
        self._tried: dict[tuple[tuple[int, ...], tuple[str, ...]], Option | None] = {}
        self._work = _IMPROVING_WORK

    def _inner(self, cuts: Sequence[int]) -> list[int]:
        """Return the cuts that may be shifted: not those between the owner's stages and the others."""
        return [position for position in cuts if self._task.front < position < self._task.back]

    def _middle(self, plan: Plan) -> list[str]:
        """Return the machines of the stages that are not pinned to the owner's."""
        task = self._task
        return [each.peer for each in plan.stages if task.front <= each.start and each.stop <= task.back]

    # --- options ----------------------------------------------------------------------------------------------------

    def kept(self) -> Option | None:
        """Return the running plan as an option; None when a machine of it has left, or is to go."""
        there = {self._task.owner.peer, *(each.peer for each in self._task.pool.members)}
        if any(stage.peer not in there for stage in self._running.stages):
            return None
        return self._option(evaluate_again(self._task, self._running))

    def _option(self, evaluated: Evaluated) -> Option:
        moves = self._haulage.moves(self._before, evaluated.holds, self._nbytes)
        move_s = self._haulage.moves_s(loads_of(moves))
        return Option(evaluated, moves, move_s, move_s + self._steps_left * evaluated.plan.predicted_step_s)

    def _try(self, inner: Sequence[int], peers: Sequence[str]) -> Option | None:
        """Return the option of cuts and machines without the owner's; None when it is not allowed or does not fit."""
        key = tuple(inner), tuple(peers)
        if key not in self._tried:
            self._tried[key] = self._worked(inner, peers) if self._allowed(peers) else None
        return self._tried[key]

    def _allowed(self, peers: Sequence[str]) -> bool:
        if not peers or len(set(peers)) < len(peers) or any(peer not in self._members for peer in peers):
            return False
        if self._compnodes and len(peers) != self._compnodes:
            return False
        return all(reachable(self._members[one], self._members[other]) for one, other in pairwise(peers))

    def _worked(self, inner: Sequence[int], peers: Sequence[str]) -> Option | None:
        task, last = self._task, len(self._task.graph.nodes)
        whole = [position for position in (task.front, *inner, task.back) if 0 < position < last]
        everyone = list(peers)
        if task.front > 0:
            everyone.insert(0, task.owner.peer)
        if task.back < last:
            everyone.append(task.owner.peer)
        for limit in in_flight_limits(task.microbatches, len(everyone)):
            self._work -= last + 10 * task.microbatches * len(everyone)
            evaluated = evaluate(task, whole, everyone, limit)
            if not evaluated.overloaded(task):
                return self._option(evaluated)
        return None

    # --- the search -------------------------------------------------------------------------------------------------

    def best(self) -> Option:
        """Return the best option found.

        Raises:
            PlacementError: no plan meets the constraints.
        """
        fresh, failure = None, None
        try:
            fresh = self._fresh()
        except PlacementError as error:
            failure = error
        found = {} if fresh is None else {self._key(fresh): fresh}
        for plan in [self._running, *(each.plan for each in found.values())]:
            for peers in self._holders_first(plan):
                self._add(found, self._try(self._inner(plan.cuts), peers))
        for inner, peers in self._solved([self._running, *([fresh.plan] if fresh else [])]):
            self._add(found, self._try(inner, peers))
        if not found:
            assert failure is not None
            raise failure
        self._work = _IMPROVING_WORK
        starts = sorted(found.values(), key=lambda each: each.total_s)[:_MOST_IMPROVED]
        return min((self._improved(each) for each in starts), key=lambda each: each.total_s)

    def _key(self, option: Option) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return option.plan.cuts, tuple(stage.peer for stage in option.plan.stages)

    def _add(self, found: dict[tuple[tuple[int, ...], tuple[str, ...]], Option], option: Option | None) -> None:
        if option is not None:
            found.setdefault(self._key(option), option)

    def _fresh(self) -> Option:
        """Return what a new job would get."""
        task = self._task
        plan = plan_training(
            task.graph,
            graph_hash=task.graph_hash,
            sizes=task.sizes,
            microbatches=task.microbatches,
            optimizer_states=task.optimizer_states,
            precision=task.precision,
            pool=task.pool,
            owner=task.owner,
            privacy=task.privacy,
            front=task.front,
            back=task.back,
            compnodes=self._compnodes,
            split_backward=task.split_backward,
        )
        return self._option(evaluate_again(task, plan))

    def _holders_first(self, plan: Plan) -> Iterator[list[str]]:
        """Yield a plan's machines, and with its stages given to machines that are alike so that few bytes move."""
        peers = self._middle(plan)
        yield peers
        if any(peer not in self._members for peer in peers):
            return
        task = self._task
        subdags = cut(task.graph, plan.cuts)
        middle = [
            subdag
            for subdag, stage in zip(subdags, plan.stages, strict=True)
            if task.front <= stage.start and stage.stop <= task.back
        ]
        held = {
            (stage, peer): sum(
                self._nbytes[key] for key in {each.key for each in subdag.weights} if peer in self._before[key]
            )
            for stage, subdag in enumerate(middle)
            for peer in self._members
        }
        assigned: dict[int, str] = {}
        for (stage, peer), nbytes in sorted(held.items(), key=lambda item: -item[1]):
            free = stage not in assigned and peer not in assigned.values()
            if nbytes and free and self._alike(self._members[peer], self._members[peers[stage]]):
                assigned[stage] = peer
        for stage in range(len(peers)):
            if stage not in assigned:
                own = self._members[peers[stage]]
                free_ones = [each for each in self._members.values() if each.peer not in assigned.values()]
                alike = [each for each in free_ones if each is own or self._alike(each, own)]
                if not alike:
                    return
                assigned[stage] = (own if own in alike else alike[0]).peer
        yield [assigned[stage] for stage in range(len(peers))]

    def _alike(self, one: Member, other: Member) -> bool:
        """Whether two machines compute about equally fast and the first holds no less."""
        rates = [flops_rate(each.device, "matmul", self._task.precision) for each in (one, other)]
        enough = one.device.memory_bytes >= other.device.memory_bytes
        return enough and abs(rates[0] / rates[1] - 1) < _ALIKE

    def _solved(self, plans: Sequence[Plan]) -> Iterator[tuple[list[int], list[str]]]:
        """Yield cuts and machines that the solver finds, best first; `plans` are to be among what it sees."""
        task = self._task
        members = self._looked_at(plans)
        positions = self._seen_positions(plans)
        segments = make_segments(
            task.graph,
            task.sizes,
            positions,
            optimizer_states=task.optimizer_states,
            cutter=task.costs.cutter(task.graph),
        )
        counts = [self._compnodes] if self._compnodes else list(range(1, len(members) + 1))
        budgets = [each.device.memory_bytes / MEMORY_MARGIN for each in members]
        peers = [each.peer for each in members]
        most = max(_FEWEST_WEIGHED, _WEIGHING_WORK // len(task.graph.nodes))
        for limit in in_flight_limits(task.microbatches, len(members) + len(segments.outer)):
            for _ in range(1 + _CORRECTIONS):
                weighing = self._weighing(segments, members, budgets, limit)
                placed = splits(weighing, counts, self._orders(plans, peers))
                ranked = _ranked(weighing, placed, most)
                named = [
                    ([positions[bound] for bound in bounds[1:-1]], [peers[machine] for machine in machines])
                    for machines, bounds in ranked
                ]
                if any(self._try(*each) for each in named):
                    yield from named
                    if not exact(weighing.line):
                        return
                    # With fewer in flight more splits fit, slower ones by themselves but maybe with less to move.
                    break
                if not self._shrunk(budgets, members, segments, ranked, limit):
                    break

    def _looked_at(self, plans: Sequence[Plan]) -> list[Member]:
        """Return the machines of the plans, and the fastest others."""
        used = {peer for plan in plans for peer in self._middle(plan)}
        idle = [each for each in self._members.values() if each.peer not in used]
        idle.sort(key=lambda each: -flops_rate(each.device, "matmul", self._task.precision))
        return [*(each for each in self._members.values() if each.peer in used), *idle[:_MOST_IDLE]]

    def _seen_positions(self, plans: Sequence[Plan]) -> list[int]:
        every = len(self._positions) / _MOST_POSITIONS
        thinned = self._positions if every <= 1 else [self._positions[int(k * every)] for k in range(_MOST_POSITIONS)]
        cuts = [position for plan in plans for position in self._inner(plan.cuts)]
        return sorted({self._task.front, *thinned, *cuts, self._task.back})

    def _weighing(
        self, segments: Segments, members: Sequence[Member], budgets: Sequence[float], limit: int
    ) -> Weighing:
        task = self._task
        line = make_line(
            segments,
            members,
            task.owner,
            task.pool,
            microbatches=task.microbatches,
            precision=task.precision,
            budgets_bytes=budgets,
            in_flight_limit=limit,
            hide_deferred=task.split_backward,
        )
        groups = weight_groups(task.graph, segments, self._before, self._nbytes)
        return Weighing(line, groups, [each.peer for each in members], self._haulage, self._steps_left)

    def _orders(self, plans: Sequence[Plan], peers: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the orders of machines to begin with; where one has left also with each idle one in its place."""
        place = {peer: index for index, peer in enumerate(peers)}
        found = []
        for plan in plans:
            middle = self._middle(plan)
            found.append(tuple(place[peer] for peer in middle if peer in place))
            gone = [index for index, peer in enumerate(middle) if peer not in place]
            if len(gone) == 1:
                for idle in place.keys() - set(middle):
                    filled = [idle if peer not in place else peer for peer in middle]
                    found.append(tuple(place[peer] for peer in filled))
        return sorted(set(found))

    def _shrunk(
        self,
        budgets: list[float],
        members: Sequence[Member],
        segments: Segments,
        ranked: Sequence[Placed],
        limit: int,
    ) -> bool:
        """Lower the budgets of machines for which the solver's sums were too low; whether any were."""
        task, place, shrunk = self._task, {each.peer: index for index, each in enumerate(members)}, False
        last = len(task.graph.nodes)
        for machines, bounds in ranked:
            cuts = [segments.positions[bound] for bound in bounds]
            peers = [members[machine].peer for machine in machines]
            if task.front > 0:
                peers.insert(0, task.owner.peer)
            if task.back < last:
                peers.append(task.owner.peer)
            whole = [position for position in cuts if 0 < position < last]
            for peer, share in evaluate(task, whole, peers, limit).overloaded(task).items():
                if peer in place:
                    index = place[peer]
                    budgets[index] = min(budgets[index], share * members[index].device.memory_bytes / MEMORY_MARGIN)
                    shrunk = True
        return shrunk

    # --- small changes ----------------------------------------------------------------------------------------------

    def _improved(self, best: Option) -> Option:
        """Change what brings an option down, until nothing does or the work is done."""
        improved = True
        while improved:
            improved = False
            for inner, peers in self._neighbours(best.plan):
                if self._work <= 0:
                    return best
                tried = self._try(inner, peers)
                if tried is not None and tried.total_s < best.total_s * (1 - 1e-9):
                    best, improved = tried, True
                    break
        return best

    def _neighbours(self, plan: Plan) -> Iterator[tuple[list[int], list[str]]]:
        """Yield a plan with cuts shifted, machines swapped, and one machine replaced, left out or added."""
        inner, peers = self._inner(plan.cuts), self._middle(plan)
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
        idle = [peer for peer in self._members if peer not in peers]
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
