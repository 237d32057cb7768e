"""Who holds which stage while machines come and go. Decisions only, like routing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fusionai.scheduling.routing.job import RoutedJob, ring_of
from fusionai.scheduling.routing.step_estimate import step_estimate

_SHARE_OF_SUMS = 0.1
"""Of the seconds of all sums, added to the step where changes are compared."""


@dataclass(frozen=True, slots=True)
class Staffing:
    """Who is where, as far as is known."""

    now_s: float
    holders: tuple[tuple[int, ...], ...]
    """By stage; those that still load its state are among them."""
    spare: tuple[int, ...]
    """Machines that are there and hold nothing, in the order in which they came."""
    queued: Mapping[int, float] = field(default_factory=dict)
    """Passes that wait on each machine, on average since the last look."""
    deaths: int = 0
    """Of all machines since the start."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A machine is to load a stage's state and hold it; one that holds another stage leaves that first."""

    machine: int
    stage: int | None
    """None: it leaves its stage for the pool."""
    replaces: int | None = None
    """Holder that leaves for the pool between two steps, when the machine has loaded the state."""


class Membership(ABC):
    """Decides who holds what."""

    @abstractmethod
    def placements(self, view: Staffing) -> tuple[Placement, ...]:
        """Return which spare machines take which stages. Asked whenever somebody is known to have come or gone."""

    @abstractmethod
    def moves(self, view: Staffing) -> tuple[Placement, ...]:
        """Return which holders change their stage. Asked between steps, when nothing is lost by it."""


class SwarmMembership(Membership):
    """As SWARM does (arXiv 2301.11913, "adaptive swarm rebalancing"): by queues, not by knowledge of links or speeds.

    As the paper describes it: from time to time the peers' queues are compared; the peer with the shortest queue in the
    stage of the least load changes to the stage of the largest. Who joins goes to the stage of the largest load.

    Ours: queues are averages since the last look; a stage keeps its last holder; moves happen between steps, so that no
    gradient is lost by one; and spare machines, which SWARM does not know, join only in place of holders that are
    missing, in the order in which they came.
    """

    def __init__(self, job: RoutedJob, holders: int, *, period_s: float = 60.0) -> None:
        """`holders`: how many there are at the start. `period_s`: between two rebalancings."""
        self._job, self._wanted, self._period_s = job, holders, period_s
        self._last_s = 0.0

    def placements(self, view: Staffing) -> tuple[Placement, ...]:
        """Fill up to the number of holders at the start, stages without any first."""
        job = self._job
        counts = [len(each) for each in view.holders]
        loads = self._loads(view)
        found = []
        for machine in view.spare:
            if sum(counts) >= self._wanted and min(counts) > 0:
                break
            possible = [stage for stage in range(job.stages) if job.possible(stage, machine)]
            if not possible:
                continue
            stage = min(possible, key=lambda each: (counts[each] > 0, -loads[each] / max(1, counts[each]), each))
            if counts[stage] and sum(counts) >= self._wanted:
                continue
            found.append(Placement(machine, stage))
            counts[stage] += 1
        return tuple(found)

    def moves(self, view: Staffing) -> tuple[Placement, ...]:
        """Move one machine, once in a period."""
        if view.now_s - self._last_s < self._period_s:
            return ()
        self._last_s = view.now_s
        loads = self._loads(view)
        sources = [stage for stage, each in enumerate(view.holders) if len(each) > 1]
        if not sources:
            return ()
        source = min(sources, key=lambda stage: (loads[stage], stage))
        target = max(range(self._job.stages), key=lambda stage: (loads[stage], -stage))
        movable = [each for each in view.holders[source] if self._job.possible(target, each)]
        if loads[target] <= loads[source] or not movable:
            return ()
        return (Placement(min(movable, key=lambda each: (view.queued.get(each, 0), each)), target),)

    def _loads(self, view: Staffing) -> list[float]:
        return [sum(view.queued.get(each, 0.0) for each in holders) for holders in view.holders]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedConfig:
    """When a change of who holds what is worth it."""

    least_gain: float = 0.15
    """Share of a step that a change must save: estimates err by about as much (docs/routing.md)."""
    snapshot_steps: int = 5
    """Steps between snapshots: half of them are lost where the only holder of a stage dies. A second holder may cost
    what that loses on average, by the deaths seen so far."""
    moving_steps: float = 10.0
    """Steps in which a change must earn the time of its state's transfer."""
    most_moves: int = 3
    """Changes between two steps."""


class BalancedMembership(Membership):
    """FusionAI's way: by the estimated step, sums of gradients and links included.

    A stage without a holder gets the spare machine with which the next steps are done first. Then spares are added, one
    after the other, where the estimated step becomes shorter, and where a stage has one holder only, if a second costs
    little. Who would slow the sum of gradients down stays in the pool. If a stage has no holder and the pool nobody for
    it, another stage gives one of its holders. Between steps, holders change places where that pays.
    """

    def __init__(self, job: RoutedJob, config: BalancedConfig | None = None) -> None:
        self._job, self._config = job, config or BalancedConfig()
        self._settled: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] | None = None
        """Holders and spares for which there is nothing to change."""

    def placements(self, view: Staffing) -> tuple[Placement, ...]:
        """Fill empty stages, then add whoever shortens the step."""
        job = self._job
        holders = [list(each) for each in view.holders]
        spare = list(view.spare)
        found: list[Placement] = []

        def put(machine: int, stage: int) -> None:
            found.append(Placement(machine, stage))
            holders[stage].append(machine)
            if machine in spare:
                spare.remove(machine)
                return
            for other, each in enumerate(holders):
                if other != stage and machine in each:
                    each.remove(machine)

        for stage in range(job.stages):
            if holders[stage] or stage in job.pinned:
                continue
            fit = [each for each in spare if job.possible(stage, each)]
            fit = fit or [each for other in holders if len(other) > 1 for each in other if job.possible(stage, each)]
            if fit:
                put(min(fit, key=lambda each: (self._taking_over_s(each, stage, holders), each)), stage)
        while spare and all(holders):
            chosen = self._faster(holders, spare) or self._safer(holders, spare, view)
            if chosen is None:
                break
            put(*chosen)
        return tuple(found)

    def _score_s(self, holders: Sequence[Sequence[int]]) -> float:
        """Return the estimated step, and a little of every sum: the slowest one hides what the others would save."""
        sums_s = 0.0
        for group in self._job.weights:
            ring = ring_of(group, holders)
            if len(ring) > 1:
                sums_s += self._job.ring_s(ring, group.size_bytes)
        return step_estimate(self._job, holders).step_s + _SHARE_OF_SUMS * sums_s

    def _additions(
        self, holders: Sequence[Sequence[int]], spare: Sequence[int]
    ) -> Iterator[tuple[int, int, list[list[int]]]]:
        for stage in range(self._job.stages):
            for machine in spare:
                if self._job.possible(stage, machine) and stage not in self._job.pinned:
                    yield (
                        machine,
                        stage,
                        [
                            sorted([*each, machine]) if place == stage else list(each)
                            for place, each in enumerate(holders)
                        ],
                    )

    def _faster(self, holders: Sequence[Sequence[int]], spare: Sequence[int]) -> tuple[int, int] | None:
        """Return the spare machine and the stage that shorten the step most."""
        most_s = self._score_s(holders) * (1 - self._config.least_gain)
        found = [(self._score_s(tried), machine, stage) for machine, stage, tried in self._additions(holders, spare)]
        step_s, machine, stage = min(found, default=(math.inf, -1, -1))
        return (machine, stage) if step_s <= most_s else None

    def _safer(self, holders: Sequence[Sequence[int]], spare: Sequence[int], view: Staffing) -> tuple[int, int] | None:
        """Return a second holder for a stage that has one, if it costs less than the only one's death on average."""
        job = self._job
        now_s = step_estimate(job, holders).step_s
        deaths_per_s = view.deaths / (len(job.peers) * view.now_s) if view.now_s > 0 else 0.0
        best: tuple[float, int, int] | None = None
        for machine, stage, tried in self._additions(holders, spare):
            if len(holders[stage]) != 1:
                continue
            # A death costs what it undoes, and loading the state.
            undone_s = self._config.snapshot_steps / 2 * now_s + job.state_s(holders[stage][0], machine, stage)
            worth_s = now_s * min(0.5, deaths_per_s * undone_s)
            own_s = sum(
                job.ring_s(ring_of(group, tried), group.size_bytes) for group in job.weights if stage in group.stages
            )
            cost_s = max(own_s, step_estimate(job, tried).step_s - now_s)
            if cost_s <= worth_s and (best is None or (cost_s, machine, stage) < best):
                best = cost_s, machine, stage
        return None if best is None else best[1:]

    def moves(self, view: Staffing) -> tuple[Placement, ...]:
        """Return the changes that shorten the step, the best first, while one pays for its transfer.

        A holder changes its stage, gives it to a machine of the pool, or leaves for the pool.
        """
        holders = [list(each) for each in view.holders]
        if not all(holders) or (view.holders, view.spare) == self._settled:
            return ()
        spare = list(view.spare)
        found: list[Placement] = []
        now_s = self._score_s(holders)
        while len(found) < self._config.most_moves:
            best: tuple[float, Placement, list[list[int]]] | None = None
            for placement, tried, transfer_s in self._changes(holders, spare):
                step_s = self._score_s(tried)
                gain_s = now_s - step_s if math.isfinite(now_s) else math.inf
                if step_s >= now_s * (1 - self._config.least_gain) or (best is not None and step_s >= best[0]):
                    continue
                if transfer_s <= self._config.moving_steps * gain_s:
                    best = step_s, placement, tried
            if best is None:
                break
            now_s, placement, holders = best
            found.append(placement)
            # Whoever changes does so once, and those who leave load nothing now.
            if placement.machine in spare:
                spare.remove(placement.machine)
        self._settled = None if found else (view.holders, view.spare)
        return tuple(found)

    def _changes(
        self, holders: Sequence[Sequence[int]], spare: Sequence[int]
    ) -> Iterator[tuple[Placement, list[list[int]], float]]:
        """Yield single changes: what is done, the holders afterwards, and the seconds of loading state."""
        job = self._job

        def after(changes: Mapping[int, list[int]]) -> list[list[int]]:
            return [changes.get(place, list(each)) for place, each in enumerate(holders)]

        for source in range(job.stages):
            if source in job.pinned:
                continue
            for machine in holders[source]:
                rest = [each for each in holders[source] if each != machine]
                for other in spare:
                    if job.possible(source, other):
                        placement = Placement(other, source, machine)
                        yield placement, after({source: sorted([*rest, other])}), job.state_s(machine, other, source)
                if not rest:
                    continue
                yield Placement(machine, None), after({source: rest}), 0.0
                for target in range(job.stages):
                    if target != source and target not in job.pinned and job.possible(target, machine):
                        transfer_s = min(job.state_s(each, machine, target) for each in holders[target])
                        tried = after({source: rest, target: sorted([*holders[target], machine])})
                        yield Placement(machine, target), tried, transfer_s

    def _taking_over_s(self, machine: int, stage: int, holders: Sequence[Sequence[int]]) -> float:
        """Return the seconds in which a machine loads an empty stage's state, and some steps are done with it."""
        job = self._job
        tried = [[machine] if place == stage else list(each) for place, each in enumerate(holders)]
        for other in tried:
            if machine in other and other != [machine]:
                other.remove(machine)
        near = [each for others in holders for each in others if each != machine]
        loading_s = min((job.state_s(each, machine, stage) for each in near), default=0.0)
        step_s = step_estimate(job, tried).step_s
        if math.isinf(step_s):  # another stage is empty too
            step_s = job.microbatches * job.pass_s(stage, machine)
        return loading_s + self._config.moving_steps * step_s
