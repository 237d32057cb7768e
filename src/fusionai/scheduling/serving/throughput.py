"""Most tokens per second over all requests: ranges, replicas, overlaps, and who is left out.

Small pools are searched whole. In others, clusters of machines with fast links are arranged: each a pipeline of its
own, or several one after another along the model. Within an arrangement segments are covered (`cover`), and the best of
what comes out, by its flows, is annealed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.links import Floats
from fusionai.scheduling.serving.cover import Filler, cover
from fusionai.scheduling.serving.placement_regions import regions_of
from fusionai.scheduling.serving.placements import best_replicas, petals_like, separate_pipelines
from fusionai.scheduling.serving.serving_evaluation import EvaluatedPlacement, Evaluator, HeldRange

_MOST_COMBINATIONS = 300_000
"""Placements of a pool that is searched whole."""

_MOST_EVALUATED = 600
"""How many of these are evaluated before the search stops being exhaustive."""

_MOST_REGIONS = 4
"""More clusters are arranged along one tour instead of in every way."""

_TRIALS = 6000
"""Changes tried in all, divided by the number of machines: evaluating one takes about so much longer."""

_MOST_TRIALS = 500

_WARMTH = 0.03
"""Share of the best rate by which a change may be worse, to begin with."""

_ADJUSTMENTS = 2
_ROUGH_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Found:
    """The best placement, and whether all of them were looked at."""

    evaluated: EvaluatedPlacement
    exact: bool


def best_throughput(
    evaluator: Evaluator, extra: Sequence[Sequence[HeldRange]] = (), *, whole: bool = True
) -> Found | None:
    """Return the best placement found, None if no machines together hold the model.

    Args:
        evaluator: of the task.
        extra: placements to start from besides the planner's own.
        whole: search small pools whole.
    """
    search = _Search(evaluator)
    for placement in extra:
        search.consider(placement)
    for rule in (petals_like, separate_pipelines, best_replicas):
        search.consider(rule(evaluator))
    for arrangement in _arrangements(regions_of(evaluator.task), evaluator):
        search.arrange(arrangement)
    exact = whole and search.everything()
    if not exact:
        search.improve()
    return Found(search.best, exact) if search.best is not None else None


def rates(evaluator: Evaluator, round_s: float) -> Floats:
    """Return the (K, P, P) rates of ranges if a round along the whole model takes so many seconds."""
    times = evaluator.times
    rest = np.maximum(round_s - times.pass_s(1.0), least_elsewhere_s(evaluator))
    return times.tokens_per_s(rest)


def least_elsewhere_s(evaluator: Evaluator) -> Floats:
    """Return the (P, P) least time that a token is outside a range: the rest of the model on the fastest machines."""
    task = evaluator.task
    inside = task.model.sums(np.where(np.isfinite(evaluator.least_s_S), evaluator.least_s_S, 0.0))
    return np.asarray(np.maximum(inside[task.front, task.back] - inside, 0.0) + evaluator.owner_s)


def part_of_the_work(evaluator: Evaluator) -> Floats:
    """Return the (P, P) shares of ranges in the FLOPs of what peers may hold."""
    task = evaluator.task
    done = task.model.sums(task.model.flops_S)
    return np.asarray(done / done[task.front, task.back])


def bound_tokens_per_s(evaluator: Evaluator) -> float:
    """Return what no placement exceeds.

    Every token passes the whole model, and each machine adds at most its best range's share of it, at the rate that the
    range would have if tokens spent the least time elsewhere.
    """
    rate = evaluator.times.tokens_per_s(least_elsewhere_s(evaluator), least=True)
    task = evaluator.task
    rate[:, :, task.back + 1 :] = rate[:, : task.front] = 0.0
    reach = (rate * part_of_the_work(evaluator)).max(axis=(1, 2))
    return min(float(reach[evaluator.kind_of].sum()), evaluator.owner_rate)


Arrangement = tuple[tuple[tuple[int, ...], ...], ...]
"""Chains of clusters; a cluster is its machines."""


def _arrangements(regions: Sequence[tuple[int, ...]], evaluator: Evaluator) -> Iterator[Arrangement]:
    """Yield ways to arrange clusters: all machines as one, and every set of chains of few clusters."""
    everyone = tuple(sorted(machine for region in regions for machine in region))
    yield ((everyone,),)
    kinds = [tuple(m for m in everyone if evaluator.kind_of[m] == kind) for kind in range(len(evaluator.times.read_s))]
    if len(kinds) > 1:
        yield tuple((kind,) for kind in kinds if kind)
    if len(regions) == 1:
        return
    if len(regions) > _MOST_REGIONS:
        yield tuple((region,) for region in regions)
        yield (tuple(_tour(regions, evaluator)),)
        return
    for parts in _partitions(list(range(len(regions)))):
        for orders in itertools.product(*(itertools.permutations(part) for part in parts)):
            yield tuple(tuple(regions[k] for k in order) for order in orders)


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *others = items
    for parts in _partitions(others):
        yield [[first], *parts]
        for index in range(len(parts)):
            yield [*parts[:index], [first, *parts[index]], *parts[index + 1 :]]


def _tour(regions: Sequence[tuple[int, ...]], evaluator: Evaluator) -> list[tuple[int, ...]]:
    """Return clusters in an order in which each is followed by the nearest one left, from the gateway on."""
    delay = evaluator.task.delay_NN
    here: Sequence[int] = [evaluator.task.gateway]
    left, tour = list(regions), []
    while left:
        nearest = min(left, key=lambda region: float(delay[np.ix_(here, region)].min()))
        left.remove(nearest)
        tour.append(nearest)
        here = nearest
    return tour


class _Search:
    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator, self.task = evaluator, evaluator.task
        self.best: EvaluatedPlacement | None = None
        task = evaluator.task
        self.segments = task.back
        # To begin with, a round takes twice as long as the fastest machines would need for it alone.
        self.first_round_s = 2 * float(np.median(evaluator.times.pass_s(1.0)[:, task.front, task.back]))
        self.part_PP = part_of_the_work(evaluator)
        self._fillers: dict[float, list[Filler]] = {}
        self._reach: dict[float, Floats] = {}

    def fillers(self, round_s: float) -> tuple[list[Filler], Floats]:
        """Return the rates by kind of device at a round's time, to two digits, and what each kind can do in all.

        The latter is in models' worth of work, times tokens per second.
        """
        rounded = float(f"{round_s:.1e}")
        if rounded not in self._fillers:
            table = rates(self.evaluator, rounded)
            table[:, :, self.task.back + 1 :] = 0.0
            table[:, : self.task.front] = 0.0
            self._reach[rounded] = (table * self.part_PP).max(axis=(1, 2))
            self._fillers[rounded] = [Filler.of(kind[: self.task.back + 1, : self.task.back + 1]) for kind in table]
        return self._fillers[rounded], self._reach[rounded]

    def consider(self, placement: Sequence[HeldRange], *, roughly: bool = False) -> EvaluatedPlacement | None:
        """Evaluate a placement, keep it if it is the best; `roughly` lets flows and times agree less in others."""
        found = self.evaluator.evaluate(placement, rounds=_ROUGH_ROUNDS) if roughly else None
        if found is None or self._is_best(found):
            # What is kept has been evaluated in full.
            found = self.evaluator.evaluate(placement)
            if found is not None and self._is_best(found):
                self.best = found
        return found

    def _is_best(self, found: EvaluatedPlacement) -> bool:
        return self.best is None or found.tokens_per_s > self.best.tokens_per_s * (1 + 1e-9)

    def arrange(self, arrangement: Arrangement) -> None:
        """Cover the model by each chain of clusters, twice: the second time with the round's time found."""
        round_s = self.first_round_s
        for _ in range(_ADJUSTMENTS):
            shares: list[HeldRange] = []
            for chain in arrangement:
                shares += self._chain(chain, round_s)
            found = self.consider(shares)
            if found is None:
                return
            if abs(found.token_s / round_s - 1) < 0.1:
                return
            round_s = found.token_s

    def _chain(self, chain: Sequence[tuple[int, ...]], round_s: float) -> list[HeldRange]:
        """Return shares of clusters that follow one another along the model, empty if they cannot hold it."""
        (kinds, reach), front, back = self.fillers(round_s), self.task.front, self.task.back
        fillers = [[kinds[self.evaluator.kind_of[machine]] for machine in cluster] for cluster in chain]
        power = [float(reach[self.evaluator.kind_of[list(cluster)]].sum()) for cluster in chain]
        if not all(power):
            return []
        most = sum(power)
        borders = [front, *(front + round((back - front) * part) for part in np.cumsum(power) / sum(power))]
        best: list[HeldRange] = []
        best_rate = 0.0
        for _ in range(1 if len(chain) == 1 else _ADJUSTMENTS):
            covered = []
            for index, cluster in enumerate(fillers):
                zone = (borders[index], borders[index + 1])
                if zone[1] <= zone[0]:
                    return best
                covered.append(cover(cluster, [zone] * len(cluster), most, self.segments))
            rate = min(each for _, each in covered)
            if rate > best_rate:
                best_rate = rate
                best = [
                    HeldRange(last, first, machine)
                    for cluster, (ranges, _) in zip(chain, covered, strict=True)
                    for machine, (first, last) in zip(cluster, ranges, strict=True)
                    if last > first
                ]
            borders = _moved(borders, [each for _, each in covered])
        return best

    def improve(self) -> None:
        """Anneal the best placement: random changes, worse ones kept less and less often; the seed is fixed."""
        if self.best is None:
            return
        draw = random.Random(0)
        trials = max(60, min(_MOST_TRIALS, _TRIALS // len(self.task.members)))
        for start in (1.0, 0.5):
            here, rate = (
                {share.machine: (share.first, share.last) for share in self.best.shares},
                self.best.tokens_per_s,
            )
            for trial in range(trials // 2):
                there = self._changed(here, draw)
                if there is None:
                    continue
                found = self.consider([HeldRange(last, first, m) for m, (first, last) in there.items()], roughly=True)
                reached = 0.0 if found is None else found.tokens_per_s
                warmth = _WARMTH * start * (1 - 2 * trial / trials) * self.best.tokens_per_s
                if reached >= rate or (warmth > 0 and draw.random() < math.exp((reached - rate) / warmth)):
                    here, rate = there, reached

    def _changed(self, placed: dict[int, tuple[int, int]], draw: random.Random) -> dict[int, tuple[int, int]] | None:
        """Return a placement with one random change, None if that does not fit."""
        front, back, count = self.task.front, self.task.back, len(self.task.members)
        there = dict(placed)
        machine, kind = draw.randrange(count), draw.random()
        if kind < 0.3 and placed:
            # A border of everybody who ends or begins there.
            border, step = draw.choice(list(placed.values()))[draw.randrange(2)], draw.choice((-1, 1))
            if border in (front, back):
                return None
            there = {m: tuple(end + step if end == border else end for end in ends) for m, ends in placed.items()}  # type: ignore[misc]
        elif kind < 0.55 and count > 1:
            other = draw.randrange(count)
            mine, theirs = placed.get(machine, (0, 0)), placed.get(other, (0, 0))
            there[machine], there[other] = theirs, mine
        elif kind < 0.75 and placed:
            # The same range as another, or one that begins where another ends.
            first, last = draw.choice(list(placed.values()))
            there[machine] = (first, last) if draw.random() < 0.5 else (last, min(back, 2 * last - first))
        elif kind < 0.8:
            there.pop(machine, None)
        else:
            first, last = placed.get(machine, (draw.randrange(front, back), back))
            there[machine] = (first + draw.choice((-1, 0, 1)), last + draw.choice((-1, 0, 1)))
        there = {m: ends for m, ends in there.items() if ends[1] > ends[0]}
        fits = self.evaluator.times.sequences
        for m, (first, last) in there.items():
            if not (front <= first and last <= back and fits[self.evaluator.kind_of[m], first, last] >= 1):
                return None
        return None if there == placed else there

    def everything(self) -> bool:
        """Look at every placement of a small pool; return whether that was possible."""
        machines, front, back = len(self.task.members), self.task.front, self.task.back
        ranges = [(0, 0), *itertools.combinations(range(front, back + 1), 2)]
        if len(ranges) ** machines > _MOST_COMBINATIONS:
            return False
        # What a range passes at the very most, and so what a placement does: the least over the segments.
        rate = self.evaluator.times.tokens_per_s(least_elsewhere_s(self.evaluator))
        choices = []
        for machine in range(machines):
            held = np.zeros((len(ranges), back - front))
            for place, (first, last) in enumerate(ranges[1:], 1):
                held[place, first - front : last - front] = rate[self.evaluator.kind_of[machine], first, last]
            choices.append(held)
        total = choices[0]
        for held in choices[1:]:
            total = (total[:, None, :] + held[None, :, :]).reshape(-1, back - front)
        bounds = total.min(axis=1)
        for count, flat in enumerate(np.argsort(-bounds, kind="stable")):
            if self.best is not None and bounds[flat] <= self.best.tokens_per_s * (1 + 1e-9):
                return True
            if bounds[flat] <= 0:
                return True
            if count >= _MOST_EVALUATED:
                return False
            digits = np.unravel_index(int(flat), (len(ranges),) * machines)
            self.consider(
                [
                    HeldRange(ranges[int(digit)][1], ranges[int(digit)][0], machine)
                    for machine, digit in enumerate(digits)
                    if digit
                ]
            )
        return True


def _moved(borders: Sequence[int], rates: Sequence[float]) -> list[int]:
    """Return borders with lengths in proportion to what each cluster reached beyond the mean, at least one segment."""
    lengths = np.diff(borders) * np.asarray([max(rate, 1e-3 * max(rates, default=1.0)) for rate in rates])
    if not math.isfinite(lengths.sum()) or lengths.sum() <= 0:
        return list(borders)
    scaled = np.cumsum(lengths) / lengths.sum() * (borders[-1] - borders[0])
    moved = [borders[0], *(borders[0] + round(each) for each in scaled)]
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + 1)
    for index in range(len(moved) - 2, 0, -1):
        moved[index] = min(moved[index], borders[-1] - (len(moved) - 1 - index))
    moved[-1] = borders[-1]
    return moved
