"""What a death loses, when that is noticed, and what is then done again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from contenders.routed_simulation.events import Events
from contenders.routed_simulation.gradient_cells import Cell, Redo
from contenders.routed_simulation.recovery_rules import RecoveryRules
from contenders.routed_simulation.routed_engine import Engine


class Deaths:
    """Takes deaths and leaves, and lets the engine do again what they lost."""

    def __init__(self, engine: Engine, events: Events, rules: RecoveryRules) -> None:
        self._engine, self._events, self._rules = engine, events, rules
        self.on_known: Callable[[], None] = lambda: None
        """Called when a death is known, so that others may take over."""
        self.on_waived: Callable[[int], None] = lambda stage: None
        """Called when a stage goes on without a gradient."""
        self.lost_cells = 0
        engine.on_sent_to_gone = self._sent_to_gone
        engine.on_gradient_to_gone = self._gradient_to_gone

    def lose(self, machine: int) -> None:
        """Lose what a machine had. Its seats are still in `Machine.seats`; the caller clears them afterwards."""
        engine = self._engine
        state = engine.machines[machine]
        lost = [
            cell
            for stage in sorted(state.seats)
            for cell in engine.ledger.cells[stage]
            if cell.machine == machine and not cell.lost and not engine.gone(cell)
        ]
        state.drop_work(self._events.now_s)
        for cell in lost:
            # What is summed is no longer only here; its tensors are gone all the same (`Engine.gone`).
            if not engine.ledger.summed[cell.stage] or not cell.backward_done:
                self._lose(cell)

    def lose_stage(self, stage: int) -> None:
        """Lose all of a stage: it has no holder left, so its sum is gone too."""
        ledger = self._engine.ledger
        ledger.forget(stage)
        for cell in ledger.cells[stage]:
            cell.redo = Redo.NO
            if cell.machine >= 0 and not cell.lost and (stage, cell.microbatch) not in ledger.waived:
                self._mark(cell)
                self._waited_for(cell)

    def known(self, machine: int, generation: int) -> None:
        """Take it that a death is known to everybody."""
        engine = self._engine
        for stage, announced in enumerate(engine.announced):
            if announced.get(machine, generation) < generation:
                del announced[machine]
                engine.policy.left(stage, machine)
        for announced, row in zip(engine.announced, engine.ledger.cells, strict=True):
            for cell in row:
                # Cells of machines that had died before are lost only now if the stage's sum went with this one.
                if cell.lost and cell.machine not in announced:
                    self._react(cell, cell.epoch)
        self.on_known()

    def _lose(self, cell: Cell) -> None:
        if cell.backward_done and cell.redo is Redo.NO:
            if (cell.stage, cell.microbatch) in self._engine.ledger.waived:
                return
            self._engine.ledger.uncount(cell)
        self._mark(cell)

    def _mark(self, cell: Cell) -> None:
        cell.lost = True
        cell.epoch += 1
        self.lost_cells += 1

    def wait_for_lost(self, machine: int) -> None:
        """Where timeouts tell: let those who wait for a dead machine's answers give it up in time."""
        if self._rules.noticed_by == "reset":
            return
        for row in self._engine.ledger.cells:
            for cell in row:
                if cell.lost and cell.machine == machine:
                    self._waited_for(cell)

    def _waited_for(self, cell: Cell) -> None:
        if self._rules.noticed_by == "reset" or cell.backward_done:
            return
        engine, now_s = self._engine, self._events.now_s
        wait_s = engine.policy.wait_s(cell.sender, cell.stage, cell.machine)
        last = cell.stage + 1 == engine.job.stages
        if not cell.forward_done or last:
            self._events.at(max(now_s, cell.sent_s + wait_s), partial(self._react, cell, cell.epoch))
        elif engine.ledger.cells[cell.stage + 1][cell.microbatch].gradient_out:
            self._events.at(now_s + wait_s, partial(self._react, cell, cell.epoch))

    def _sent_to_gone(self, cell: Cell) -> None:
        if self._rules.noticed_by == "timeout":
            self._waited_for(cell)
            self._events.at(self._events.now_s + self._rules.expiry_s, partial(self._react, cell, cell.epoch))

    def _gradient_to_gone(self, cell: Cell) -> None:
        if self._rules.noticed_by == "timeout" and not cell.backward_done:
            wait_s = self._engine.policy.wait_s(cell.sender, cell.stage, cell.machine)
            self._events.at(self._events.now_s + wait_s, partial(self._react, cell, cell.epoch))

    def react(self, cell: Cell) -> None:
        """Do again now what a cell's machine, which left, had of it."""
        self._react(cell, cell.epoch)

    def _react(self, cell: Cell, epoch: int) -> None:
        """Do what the rules say about a lost cell, unless it has been done."""
        if not cell.lost or cell.epoch != epoch:
            return
        engine, stage = self._engine, cell.stage
        if self._rules.noticed_by == "timeout" and not cell.backward_done:
            engine.policy.unanswered(cell.sender, stage, cell.machine)
        what = "stage"
        if cell.redo is Redo.NO:
            what = self._rules.counted if cell.backward_done else self._rules.held if cell.forward_done else "stage"
        if what == "stage":
            redo = cell.redo
            engine.withdraw(cell)
            cell.redo = redo
            engine.reroute(cell)
        elif what == "microbatch":
            engine.restart(cell.microbatch)
        else:
            cell.lost = False
            engine.ledger.waive(cell)
            engine.serve_neighbours(cell)
            self.on_waived(stage)
