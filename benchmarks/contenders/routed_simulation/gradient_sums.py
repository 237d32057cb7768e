"""The end of a step: each weight's gradients are summed among its holders, then everybody reports and updates.

As in `fusionai.simulation.sums_and_commit`, a sum is a ring all-reduce, a machine is in one at a time, and a sum begins
when its stages have all their gradients. A machine that dies in a sum breaks it; what it had added up is computed again
elsewhere, and the sum begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from contenders.routed_simulation.events import Events
from contenders.routed_simulation.routed_engine import Engine
from contenders.routers.routed_job import SharedWeights


class Sums:
    """The sums of one step after the other."""

    def __init__(self, engine: Engine, events: Events) -> None:
        self._engine, self._events = engine, events
        self.on_committed: Callable[[], None] = lambda: None
        self.summed_s = 0.0
        self._groups: tuple[SharedWeights, ...] = engine.job.weights
        self._turn = 0
        """Rises with each step, and when a commit is called off: what was due before is void."""
        self.begin_step()

    def begin_step(self) -> None:
        """Begin a step: nothing is summed."""
        self._done = [False] * len(self._groups)
        self._running: dict[int, tuple[int, ...]] = {}
        """Rings of sums under way, by group."""
        self._turn += 1
        self._until_s: dict[int, float] = {}
        self._committing = False

    def check(self, stage: int) -> None:
        """Begin what can begin now that a stage has one more gradient."""
        if self._engine.ledger.complete(stage):
            self.check_all()

    def check_all(self) -> None:
        """Begin the sums that can begin, and commit when there is none left."""
        engine = self._engine
        ledger = engine.ledger
        for number, group in enumerate(self._groups):
            if self._done[number] or number in self._running or not all(map(ledger.complete, group.stages)):
                continue
            ring = self._ring(group)
            if ring is not None:
                self._begin(number, ring)
        for stage in range(engine.job.stages):
            if ledger.summed[stage] or not ledger.complete(stage) or not self._holders(stage):
                continue
            if all(self._done[number] for number, group in enumerate(self._groups) if stage in group.stages):
                ledger.check(stage, {each.number for each in engine.machines if stage in each.seats})
                ledger.summed[stage] = True
        if all(ledger.summed) and not self._committing:
            self._committing = True
            self.summed_s = self._events.now_s
            self._events.at(self._events.now_s + self._commit_s(), partial(self._committed, self._turn))

    def broken(self, machine: int) -> None:
        """Take a machine's death or leave."""
        for number in [each for each, ring in self._running.items() if machine in ring]:
            del self._running[number]

    def lost_stage(self, stage: int) -> None:
        """Take back the sums of a stage that has no holder any more."""
        for number, group in enumerate(self._groups):
            if stage in group.stages:
                self._running.pop(number, None)
                # Of weights that another stage holds too, the sum is still there.
                if not any(self._holders(each) for each in group.stages):
                    self._done[number] = False
        if self._committing:
            self._committing = False
            self._turn += 1

    def _holders(self, stage: int) -> list[int]:
        return [each.number for each in self._engine.machines if stage in each.seats]

    def _ring(self, group: SharedWeights) -> tuple[int, ...] | None:
        """Return who sums; None while somebody who is taken to be there is not, or nobody is there."""
        engine = self._engine
        ring: set[int] = set()
        for stage in group.stages:
            holders = self._holders(stage)
            if not holders or set(engine.announced[stage]) - set(holders):
                return None
            ring |= set(holders)
        return tuple(sorted(ring))

    def _begin(self, number: int, ring: tuple[int, ...]) -> None:
        if len(ring) == 1:
            self._done[number] = True
            return
        start_s = max([self._events.now_s, *(self._until_s.get(machine, 0.0) for machine in ring)])
        end_s = start_s + self._engine.job.ring_s(ring, self._groups[number].size_bytes)
        self._until_s |= dict.fromkeys(ring, end_s)
        self._running[number] = ring
        self._events.at(end_s, partial(self._ends, number, ring, self._turn))

    def _ends(self, number: int, ring: tuple[int, ...], turn: int) -> None:
        if turn != self._turn or self._running.get(number) is not ring:
            return
        del self._running[number]
        self._done[number] = True
        self.check_all()

    def _commit_s(self) -> float:
        """Return the seconds of the slowest report, answer and update."""
        job = self._engine.job
        slowest_s = 0.0
        for machine in self._engine.machines:
            if machine.seats:
                away_s = 0.0
                if job.driver >= 0:
                    away_s = float(job.delay_s[job.driver, machine.number] + job.delay_s[machine.number, job.driver])
                update_s = sum(float(job.update_s[stage, machine.number]) for stage in machine.seats)
                slowest_s = max(slowest_s, away_s + update_s)
        return slowest_s

    def _committed(self, turn: int) -> None:
        if turn == self._turn:
            self.on_committed()
