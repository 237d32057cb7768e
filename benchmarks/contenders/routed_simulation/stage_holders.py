"""Who holds which stage: loading state, taking over, changing stages, and stages that everybody left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from contenders.routed_simulation.deaths import Deaths
from contenders.routed_simulation.events import Events
from contenders.routed_simulation.gradient_sums import Sums
from contenders.routed_simulation.machine_queues import Machine
from contenders.routed_simulation.recovery_rules import RecoveryRules
from contenders.routed_simulation.routed_engine import Engine
from contenders.routers.membership import Membership, Placement, Staffing


@dataclass(frozen=True, slots=True)
class _Loading:
    """A state on its way to a machine."""

    number: int
    """Among all loadings; a later one for the same machine and stage takes the place of an earlier one."""
    placement: Placement
    ends_s: float


class StageHolders:
    """Applies what the membership decides."""

    def __init__(
        self, engine: Engine, events: Events, deaths: Deaths, sums: Sums, membership: Membership, rules: RecoveryRules
    ) -> None:
        self._engine, self._events, self._deaths, self._sums = engine, events, deaths, sums
        self._membership, self._rules = membership, rules
        self._loading: dict[tuple[int, int], _Loading] = {}
        """By machine and stage: whose state is on its way."""
        self._ready: dict[tuple[int, int], int] = {}
        """By machine and stage: whom a machine that has loaded the state replaces when the step is over."""
        self._loadings = 0
        self._came = [each.number for each in engine.machines]
        self._empty: set[int] = set()
        """Stages whose state nobody has but in a snapshot."""
        self._replaying: set[tuple[int, int]] = set()
        """Machines and stages whose steps since the snapshot they compute again after loading it."""
        self._deaths_seen = 0
        self.steps_since_snapshot: Callable[[], int] = lambda: 0
        self.usual_step_s: Callable[[], float] = lambda: 0.0
        self.on_roll_back: Callable[[], None] = lambda: None
        self.joined = 0
        self.moved = 0
        deaths.on_known = self.changed

    def seat(self, machine: int, stage: int) -> None:
        """Let a machine hold a stage from now on."""
        state = self._engine.machines[machine]
        state.seats.add(stage)
        self._engine.announced[stage][machine] = state.generation
        self._engine.policy.joined(stage, machine)
        if len(state.seats) > 1:
            self._engine.make_room(state)

    def down(self, machine: int) -> None:
        """Take a death."""
        state = self._engine.machines[machine]
        state.alive = False
        self._deaths_seen += 1
        self._came.remove(machine)
        for key in [each for each in (*self._loading, *self._ready) if each[0] == machine]:
            self._loading.pop(key, None)
            self._ready.pop(key, None)
        stages = self._vacate(state)
        self._deaths.wait_for_lost(machine)
        known_s = self._events.now_s + self._rules.known_after_s
        self._events.at(known_s, partial(self._known, machine, state.generation))
        self._emptied(stages)

    def up(self, machine: int) -> None:
        """Take a machine's return, with nothing. It announces itself, so that it had died is known."""
        state = self._engine.machines[machine]
        state.alive = True
        self._came.append(machine)
        self._known(machine, state.generation)

    def changed(self) -> None:
        """Let the membership place who is spare."""
        for (machine, stage), replaced in list(self._ready.items()):
            if stage not in self._engine.machines[replaced].seats:
                del self._ready[machine, stage]  # whom it was to replace is gone before
                self._take_seat(machine, stage)
        for placement in self._membership.placements(self._view()):
            self._load(placement)

    def between_steps(self) -> None:
        """Let the membership move holders."""
        for (machine, stage), replaced in list(self._ready.items()):
            del self._ready[machine, stage]
            self._take_seat(machine, stage)
            self._leave_seat(replaced, stage)
            self.moved += 1
        for placement in self._membership.moves(self._view()):
            self.moved += placement.replaces is None
            self._load(placement)
        self.changed()

    @property
    def unheld(self) -> list[int]:
        """Return the stages that nobody holds."""
        return [stage for stage in range(self._engine.job.stages) if not self._holders(stage)]

    def _known(self, machine: int, generation: int) -> None:
        self._deaths.known(machine, generation)
        self._sums.check_all()

    def _holders(self, stage: int) -> list[int]:
        return [each.number for each in self._engine.machines if stage in each.seats]

    def _view(self) -> Staffing:
        engine = self._engine
        now_s = self._events.now_s
        holders = [sorted(each) for each in engine.announced]
        coming = [(*key, each.placement.replaces) for key, each in self._loading.items()]
        coming += [(*key, replaced) for key, replaced in self._ready.items()]
        leaving = []
        for machine, stage, replaced in coming:
            holders[stage].append(machine)
            if replaced in holders[stage]:
                holders[stage].remove(replaced)
                leaving.append(replaced)
        taken = {machine for each in holders for machine in each} | {engine.job.driver, *leaving}
        spare = tuple(each for each in self._came if each not in taken)
        queued = {each.number: each.take_waiting(now_s) for each in engine.machines if each.seats}
        return Staffing(now_s, tuple(tuple(each) for each in holders), spare, queued, self._deaths_seen)

    def _vacate(self, state: Machine) -> list[int]:
        """Take a machine's seats and all it had; return the seats."""
        self._deaths.lose(state.number)
        stages = sorted(state.seats)
        state.seats.clear()
        self._sums.broken(state.number)
        return stages

    def _leave(self, machine: int) -> None:
        """Let a machine leave the stage that it holds; what it had of the step is done again at once."""
        state = self._engine.machines[machine]
        if not state.seats:
            return
        stages = self._vacate(state)
        for stage in stages:
            self._engine.announced[stage].pop(machine, None)
            self._engine.policy.left(stage, machine)
        for row in self._engine.ledger.cells:
            for cell in row:
                if cell.lost and cell.machine == machine:
                    self._deaths.react(cell)
        self._emptied(stages)

    def _leave_seat(self, machine: int, stage: int) -> None:
        """Let a machine leave one of its stages between two steps, when nothing is lost by it."""
        seats = self._engine.machines[machine].seats
        if stage in seats and len(seats) > 1:
            seats.remove(stage)
            self._engine.announced[stage].pop(machine, None)
            self._engine.policy.left(stage, machine)
            self._emptied([stage])
        elif stage in seats:
            self._leave(machine)

    def _emptied(self, stages: list[int]) -> None:
        for stage in stages:
            if not self._holders(stage):
                self._empty.add(stage)
                self._sums.lost_stage(stage)
                self._deaths.lose_stage(stage)

    def _load(self, placement: Placement) -> None:
        """Let a machine leave what it is not to keep, and begin loading a stage's state, one after the other."""
        machine, stage = placement.machine, placement.stage
        if not placement.keeps:
            self._leave(machine)
        if stage is None:
            return
        source, seconds, replays = self._source(machine, stage)
        if replays:
            self._replaying.add((machine, stage))
        else:
            self._replaying.discard((machine, stage))
        ends = [each.ends_s for (other, _), each in self._loading.items() if other == machine]
        ends_s = max([self._events.now_s, *ends]) + seconds
        self._loadings += 1
        self._loading[machine, stage] = _Loading(self._loadings, placement, ends_s)
        generation = self._engine.machines[source].generation
        self._events.at(ends_s, partial(self._loaded, (machine, stage), self._loadings, source, generation))

    def _source(self, machine: int, stage: int) -> tuple[int, float, bool]:
        """Return from whom a machine gets a state, in which time, and whether it computes steps since a snapshot again.

        From the holder with the fastest link; or from a snapshot, if that is faster with the steps since. Snapshots lie
        with machines that are there; which ones is not followed up, the fastest link stands for them.
        """
        engine, job = self._engine, self._engine.job
        holders = [each for each in self._holders(stage) if each != machine]
        others = [each.number for each in engine.machines if each.alive and each.number != machine]

        def nearest(machines: list[int]) -> tuple[int, float]:
            source = min(machines, key=lambda each: (job.state_s(each, machine, stage), each), default=machine)
            return source, job.state_s(source, machine, stage)

        steps = self.steps_since_snapshot()
        again_s = steps * job.microbatches * job.pass_s(stage, machine)
        source, seconds = nearest(others)
        replays = self._rules.roll_back == "if faster" and again_s <= steps * self.usual_step_s()
        if holders:
            holder, direct_s = nearest(holders)
            if not replays or direct_s <= seconds + again_s:
                return holder, direct_s, False
        if not replays:
            return source, seconds, False
        engine.recomputed_s += again_s
        return source, seconds + again_s, True

    def _loaded(self, key: tuple[int, int], number: int, source: int, generation: int) -> None:
        loading = self._loading.get(key)
        if loading is None or loading.number != number:
            return
        del self._loading[key]
        machine, stage = key
        if self._engine.machines[source].generation != generation and source != machine:
            self.changed()  # the source died or left meanwhile
            return
        self.joined += 1
        replaced = loading.placement.replaces
        if replaced is None or stage not in self._engine.machines[replaced].seats:
            self._take_seat(machine, stage)
        elif loading.placement.at_once and self._engine.machines[replaced].seats == {stage}:
            self._take_seat(machine, stage)
            self._leave(replaced)
            self.moved += 1
        else:
            self._ready[key] = replaced

    def _take_seat(self, machine: int, stage: int) -> None:
        self.seat(machine, stage)
        back = stage in self._empty and (machine, stage) not in self._replaying
        self._empty.discard(stage)
        if back:
            self.on_roll_back()
            return
        self._engine.flush(stage)
        self._engine.inject()
        self._sums.check_all()
