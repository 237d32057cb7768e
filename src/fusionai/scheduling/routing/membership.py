"""Who holds which stage while machines come and go. Decisions only, like routing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fusionai.scheduling.routing.job import RoutedJob
from fusionai.scheduling.routing.step_estimate import step_estimate


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
    """A machine is to load a stage's state and hold it; of a move, it leaves its stage first."""

    machine: int
    stage: int


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

    least_gain: float = 0.02
    """Share of a step that another holder must save."""
    snapshot_steps: int = 5
    """Steps between snapshots: half of them are lost where the only holder of a stage dies. A second holder may cost
    what that loses on average, by the deaths seen so far."""
    moving_steps: float = 20.0
    """Steps in which a move must earn the time of its state's transfer."""


class BalancedMembership(Membership):
    """FusionAI's way: by the estimated step, sums of gradients and links included.

    A stage without a holder gets the spare machine that is ready first. Then spares are added, one after the other,
    where the estimated step becomes shorter, and where a stage has one holder only, if a second costs little. Who would
    slow the sum of gradients down stays in the pool. If a stage has no holder and the pool nobody for it, the machine
    that others miss least leaves its stage for it.
    """

    def __init__(self, job: RoutedJob, config: BalancedConfig | None = None) -> None:
        self._job, self._config = job, config or BalancedConfig()

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
            if not fit:
                fit = [
                    each
                    for other in holders
                    if len(other) > 1
                    for each in other
                    if job.possible(stage, each)
                ]
            if fit:
                put(min(fit, key=lambda each: (self._ready_s(each, stage, holders), each)), stage)
        while spare and all(holders):
            now_s = step_estimate(job, holders).step_s
            deaths_per_s = view.deaths / (len(job.peers) * view.now_s) if view.now_s > 0 else 0.0
            undone_s = self._config.snapshot_steps / 2 * now_s
            best: tuple[float, int, int] | None = None
            for stage in range(job.stages):
                thin = len(holders[stage]) == 1
                for machine in spare:
                    if not job.possible(stage, machine) or stage in job.pinned:
                        continue
                    tried = [[*each, machine] if place == stage else each for place, each in enumerate(holders)]
                    step_s = step_estimate(job, tried).step_s
                    most_s = now_s * (1 - self._config.least_gain)
                    if thin:
                        # What the death of the only holder costs: what it undoes, and loading its state.
                        loading_s = job.state_s(holders[stage][0], machine, stage)
                        most_s = now_s * (1 + min(0.5, deaths_per_s * (undone_s + loading_s)))
                    # A thin stage comes before one that would only be faster.
                    choice = (step_s - (now_s if thin else 0.0), stage, machine)
                    if step_s <= most_s and (best is None or choice < best):
                        best = choice
            if best is None:
                break
            put(best[2], best[1])
        return tuple(found)

    def moves(self, view: Staffing) -> tuple[Placement, ...]:
        """Return the one move that shortens the step most, if that pays for its transfer."""
        job = self._job
        holders = [list(each) for each in view.holders]
        if not all(holders):
            return ()
        now_s = step_estimate(job, holders).step_s
        best: tuple[float, int, int] | None = None
        for source in range(job.stages):
            if len(holders[source]) < 2 or source in job.pinned:
                continue
            for machine in holders[source]:
                for target in range(job.stages):
                    if target == source or target in job.pinned or not job.possible(target, machine):
                        continue
                    tried = [
                        [*each, machine] if place == target else [other for other in each if other != machine]
                        if place == source
                        else each
                        for place, each in enumerate(holders)
                    ]
                    step_s = step_estimate(job, tried).step_s
                    if step_s < now_s * (1 - self._config.least_gain) and (best is None or (step_s,) < best):
                        transfer_s = min(job.state_s(each, machine, target) for each in holders[target])
                        if transfer_s <= self._config.moving_steps * (now_s - step_s):
                            best = step_s, machine, target
        return () if best is None else (Placement(best[1], best[2]),)

    def _ready_s(self, machine: int, stage: int, holders: Sequence[Sequence[int]]) -> float:
        """Return about when an empty stage's work would be done by a machine: loading its state, then a step."""
        job = self._job
        near = [each for others in holders for each in others if each != machine]
        loading_s = min((job.state_s(each, machine, stage) for each in near), default=0.0)
        if math.isinf(loading_s):
            return math.inf
        return loading_s + job.microbatches * job.pass_s(stage, machine)
