"""Who holds which stage: loading state, taking over, changing stages, and stages that everybody left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fusionai.scheduling.routing.membership import Membership, Placement, Staffing
from fusionai.simulation.routing.deaths import Deaths
from fusionai.simulation.routing.engine import Engine
from fusionai.simulation.routing.events import Events
from fusionai.simulation.routing.machines import Machine
from fusionai.simulation.routing.rules import RecoveryRules
from fusionai.simulation.routing.sums import Sums


class Staff:
    """Applies what the membership decides."""

    def __init__(
        self, engine: Engine, events: Events, deaths: Deaths, sums: Sums, membership: Membership, rules: RecoveryRules
    ) -> None:
        self._engine, self._events, self._deaths, self._sums = engine, events, deaths, sums
        self._membership, self._rules = membership, rules
        self._loading: dict[int, tuple[int, int, int | None]] = {}
        """Machines that load a stage's state: the stage, the number of the loading, and whom they are to replace."""
        self._ready: dict[int, tuple[int, int]] = {}
        """Machines that have loaded a stage's state and replace a holder of it when the step is over."""
        self._loadings = 0
        self._came = [each.number for each in engine.machines]
        self._empty: set[int] = set()
        """Stages whose state nobody has but in a snapshot."""
        self._replaying: set[int] = set()
        """Machines that compute a stage's steps since the snapshot again after loading it."""
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

    def down(self, machine: int) -> None:
        """Take a death."""
        state = self._engine.machines[machine]
        state.alive = False
        self._deaths_seen += 1
        self._came.remove(machine)
        self._loading.pop(machine, None)
        self._ready.pop(machine, None)
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
        for machine, (stage, replaced) in list(self._ready.items()):
            if stage not in self._engine.machines[replaced].seats:
                del self._ready[machine]  # whom it was to replace is gone before
                self._take_seat(machine, stage)
        for placement in self._membership.placements(self._view()):
            self._leave(placement.machine)
            self._load(placement)

    def between_steps(self) -> None:
        """Let the membership move holders."""
        for machine, (stage, replaced) in list(self._ready.items()):
            del self._ready[machine]
            self._take_seat(machine, stage)
            self._leave(replaced)
            self.moved += 1
        for placement in self._membership.moves(self._view()):
            if placement.replaces is None:
                self._leave(placement.machine)
                self.moved += 1
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
        coming = [(machine, stage, replaced) for machine, (stage, _, replaced) in self._loading.items()]
        coming += [(machine, stage, replaced) for machine, (stage, replaced) in self._ready.items()]
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

    def _emptied(self, stages: list[int]) -> None:
        for stage in stages:
            if not self._holders(stage):
                self._empty.add(stage)
                self._sums.lost_stage(stage)
                self._deaths.lose_stage(stage)

    def _load(self, placement: Placement) -> None:
        """Begin loading a stage's state: from the holder with the fastest link, else from a snapshot.

        Snapshots lie with machines that are there; which ones is not followed up, the fastest link stands for them.
        """
        engine, job = self._engine, self._engine.job
        machine, stage = placement.machine, placement.stage
        if stage is None:
            return
        holders = self._holders(stage)
        others = holders or [each.number for each in engine.machines if each.alive and each.number != machine]
        source = min(others, key=lambda each: (job.state_s(each, machine, stage), each), default=machine)
        seconds = job.state_s(source, machine, stage)
        replay = not holders and self._rules.roll_back == "if faster"
        if replay:
            again_s = self.steps_since_snapshot() * job.microbatches * job.pass_s(stage, machine)
            replay = again_s <= self.steps_since_snapshot() * self.usual_step_s()
            if replay:
                engine.recomputed_s += again_s
                seconds += again_s
        self._loadings += 1
        self._loading[machine] = stage, self._loadings, placement.replaces
        if replay:
            self._replaying.add(machine)
        else:
            self._replaying.discard(machine)
        generation = engine.machines[source].generation
        ends_s = self._events.now_s + seconds
        self._events.at(ends_s, partial(self._loaded, machine, self._loadings, source, generation))

    def _loaded(self, machine: int, number: int, source: int, generation: int) -> None:
        stage, current, replaced = self._loading.get(machine, (-1, -1, None))
        if current != number:
            return
        del self._loading[machine]
        if self._engine.machines[source].generation != generation and source != machine:
            self.changed()  # the source died or left meanwhile
            return
        self.joined += 1
        if replaced is not None and stage in self._engine.machines[replaced].seats:
            self._ready[machine] = stage, replaced
            return
        self._take_seat(machine, stage)

    def _take_seat(self, machine: int, stage: int) -> None:
        self.seat(machine, stage)
        back = stage in self._empty and machine not in self._replaying
        self._empty.discard(stage)
        if back:
            self.on_roll_back()
            return
        self._engine.flush(stage)
        self._engine.inject()
        self._sums.check_all()
