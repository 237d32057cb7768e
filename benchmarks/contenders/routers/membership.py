"""Who holds which stage while machines come and go. Decisions only, like routing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from contenders.routers.routed_job import RoutedJob


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
    """A machine is to load a stage's state and hold it."""

    machine: int
    stage: int | None
    """None: it loads nothing and leaves its stage for the pool."""
    replaces: int | None = None
    """Holder that leaves the stage when the machine has loaded the state: between two steps, or `at_once`."""
    keeps: bool = False
    """Whether it goes on holding what it holds; otherwise it leaves that before it loads."""
    at_once: bool = False
    """Whether the holder that is replaced leaves in the middle of a step; what it had of it is done again."""


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
