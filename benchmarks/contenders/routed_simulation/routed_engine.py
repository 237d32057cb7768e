"""Microbatches on their way through the stages and back, within one step.

Every pass starts when its machine is free and its tensors are there. A forward waits while the stage holds as many
microbatches as memory allows; one that need not wait goes before the stage's backwards. Of several stages one with a
backward to run goes first, and among equals the later one. Senders keep boundary tensors until the step ends, so what a
machine loses can be computed again from what its neighbours kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from contenders.routed_simulation.events import Events
from contenders.routed_simulation.gradient_cells import NOBODY, Cell, Ledger, Redo, Tensor
from contenders.routed_simulation.machine_queues import Machine, Wire
from contenders.routers.route_policy import Hop, RoutePolicy
from contenders.routers.routed_job import DRIVER, RoutedJob
from fusionai.simulation.simulated_links import SimulatedLinks

_AFTER_ARRIVALS = 1
"""Rank of a machine's look for its next pass: what arrives at the same moment is there."""


class Engine:
    """The passes and transfers of a step."""

    def __init__(self, job: RoutedJob, policy: RoutePolicy, events: Events, channels: SimulatedLinks) -> None:
        self.job, self.policy, self.events = job, policy, events
        self.machines = [Machine(number, peer) for number, peer in enumerate(job.peers)]
        self.announced: list[dict[int, int]] = [{} for _ in range(job.stages)]
        """By stage: machines that senders may choose, and their generation when they announced themselves."""
        self.ledger = Ledger(job.stages, job.microbatches)
        self.step = 0
        self.recomputed_s = 0.0
        self.on_pass: Callable[[Machine, Cell, bool], None] | None = None
        """Called when a pass has ended, where somebody wants to know."""
        self.on_counted: Callable[[int], None] = lambda stage: None
        """Called when a stage's gradient of one more microbatch counts."""
        self.on_sent_to_gone: Callable[[Cell], None] = lambda cell: None
        """Called when a cell was given to a machine that does not hold the stage any more."""
        self.on_gradient_to_gone: Callable[[Cell], None] = lambda cell: None
        """Called when a gradient is ready for a cell whose machine is gone."""
        self._channels = channels
        self._wires: dict[tuple[int, int], Wire] = {}
        self._pending: deque[int] = deque()
        self._open: set[int] = set()
        """Microbatches that were fed and are not through the first stage's backward."""

    def end_step(self) -> None:
        """Make void whatever is still under way."""
        for row in self.ledger.cells:
            for cell in row:
                cell.epoch += 1
                cell.lost = False
        for machine in self.machines:
            machine.held.clear()
        self.ledger = Ledger(self.job.stages, self.job.microbatches)
        self._pending.clear()

    def begin_step(self, step: int) -> None:
        """Begin a step."""
        self.step = step
        self.ledger = Ledger(self.job.stages, self.job.microbatches)
        self._pending = deque(range(self.job.microbatches))
        self._open = set()
        self.policy.began_step()
        self.inject()

    def inject(self) -> None:
        """Feed microbatches as long as the first stage's holders have room."""
        room = sum(self.room(0, self.machines[machine]) for machine in self.announced[0])
        while self._pending and len(self._open) < room:
            microbatch = self._pending.popleft()
            self._open.add(microbatch)
            self._route(self.ledger.cells[0][microbatch], self.job.driver)

    def flush(self, stage: int) -> None:
        """Route what waited for a stage to have a holder."""
        for cell in self.ledger.cells[stage]:
            if cell.stranded:
                cell.stranded = False
                self.reroute(cell)

    def room(self, stage: int, machine: Machine) -> int:
        """Return how many microbatches of a stage a machine may hold, with all the stages that it holds now."""
        if len(machine.seats) < 2:
            return int(self.job.in_flight[stage, machine.number])
        return self.job.room(stage, machine.number, machine.seats)

    def make_room(self, machine: Machine) -> None:
        """Give up the latest microbatches of a machine that has taken a stage more and has less room for each.

        Their forwards are computed again from what the stage before keeps.
        """
        for stage in sorted(machine.seats):
            most = self.room(stage, machine)
            held = [
                cell
                for cell in self.ledger.cells[stage]
                if cell.machine == machine.number and cell.begun and not (cell.backward_done or cell.lost)
                if not self.gone(cell)
            ]
            for cell in reversed(held[most:]):
                redo = cell.redo
                self.withdraw(cell)
                cell.redo = redo
                self.reroute(cell)

    def gone(self, cell: Cell) -> bool:
        """Whether a cell's machine no longer has anything of it."""
        return self.machines[cell.machine].generation != cell.generation

    def reroute(self, cell: Cell) -> None:
        """Route a cell that nobody has, if what goes into it is there; otherwise that comes first."""
        if cell.stage == 0:
            self._route(cell, self.job.driver)
            return
        before = self.ledger.cells[cell.stage - 1][cell.microbatch]
        if before.lost or before.machine == NOBODY or not before.forward_done:
            return
        if self.gone(before):
            self._compute_again(before, Redo.FORWARD)
        else:
            self._route(cell, before.machine)

    def serve_neighbours(self, cell: Cell) -> None:
        """Let the neighbours of a cell have its tensors, computed again, if they lack them."""
        if cell.stage:
            self._pull_gradient(self.ledger.cells[cell.stage - 1][cell.microbatch])
        if cell.stage + 1 < self.job.stages:
            self._pull_input(self.ledger.cells[cell.stage + 1][cell.microbatch])

    def restart(self, microbatch: int) -> None:
        """Drop a microbatch at all stages and begin with it anew."""
        self._open.discard(microbatch)
        for row in self.ledger.cells:
            self.withdraw(row[microbatch])
        self._pending.appendleft(microbatch)
        self.inject()

    def withdraw(self, cell: Cell) -> None:
        """Take a cell from its machine, gradient and all."""
        if cell.machine != NOBODY:
            self.policy.withdrawn(
                cell.stage, cell.machine, forward_done=cell.forward_done, backward_done=cell.backward_done
            )
            if not self.gone(cell):
                machine = self.machines[cell.machine]
                if cell.begun and not cell.backward_done:
                    machine.held[cell.stage] -= 1
                self._wake(machine)
            if cell.backward_done and not cell.lost and cell.redo is Redo.NO:
                self.ledger.uncount(cell)
        cell.reset()

    def _compute_again(self, cell: Cell, redo: Redo) -> None:
        """Let a cell whose gradient counts be computed again, because its tensors are gone."""
        cell.reset()
        cell.redo = redo
        self.reroute(cell)

    def _route(self, cell: Cell, sender: int) -> None:
        job, stage = self.job, cell.stage
        candidates = [
            each for each in self.announced[stage] if sender == DRIVER or not stage or job.bandwidth[sender, each] > 0
        ]
        if not candidates:
            cell.stranded = True
            return
        hop = Hop(self.events.now_s, sender, stage, cell.microbatch)
        machine = self.machines[self.policy.choose(hop, candidates)]
        cell.machine, cell.sender, cell.sent_s = machine.number, sender, self.events.now_s
        cell.generation = machine.generation
        self.policy.assigned(hop, machine.number)
        if stage not in machine.seats:
            cell.lost = True
            self.on_sent_to_gone(cell)
            return
        self._pull_input(cell)
        self._pull_gradient(cell)

    def _pull_input(self, cell: Cell) -> None:
        """Let what goes into a cell come, if it is there and the cell lacks it."""
        if cell.input is not Tensor.MISSING or cell.lost or cell.machine == NOBODY:
            return
        if cell.stage == 0:
            self._input_there(cell, cell.epoch)
            return
        before = self.ledger.cells[cell.stage - 1][cell.microbatch]
        if not before.forward_done or before.lost:
            return
        if self.gone(before):
            self._compute_again(before, Redo.FORWARD)
            return
        cell.input = Tensor.COMING
        size_bytes = self.job.forward_bytes[cell.stage]
        self._send(before.machine, cell, size_bytes, self._input_there, self._input_failed)

    def _pull_gradient(self, cell: Cell) -> None:
        """Let the gradient of what a cell sent come, if it is there and the cell lacks it."""
        last = cell.stage + 1 == self.job.stages
        if cell.gradient is not Tensor.MISSING or cell.lost or cell.machine == NOBODY or last:
            return
        if cell.redo is Redo.FORWARD:
            return
        after = self.ledger.cells[cell.stage + 1][cell.microbatch]
        if not after.gradient_out or after.lost:
            return
        if self.gone(after):
            self._compute_again(after, Redo.BOTH)
            return
        cell.gradient = Tensor.COMING
        size_bytes = self.job.gradient_bytes[cell.stage + 1]
        self._send(after.machine, cell, size_bytes, self._gradient_there, self._gradient_failed)

    def _send(
        self,
        source: int,
        cell: Cell,
        size_bytes: float,
        arrive: Callable[[Cell, int], None],
        fail: Callable[[Cell, int], None],
    ) -> None:
        epoch = cell.epoch
        if source == cell.machine or not size_bytes:
            arrive(cell, epoch)
            return
        key = source, cell.machine
        if (wire := self._wires.get(key)) is None:
            channel = self._channels.between(self.job.peers[source], self.job.peers[cell.machine])
            wire = self._wires[key] = Wire(self.events, channel, self.machines[source])
        wire.send(
            size_bytes,
            lambda: cell.epoch == epoch and not cell.lost,
            partial(arrive, cell, epoch),
            partial(fail, cell, epoch),
        )

    def _input_there(self, cell: Cell, epoch: int) -> None:
        if cell.epoch != epoch or cell.lost:
            return
        cell.input = Tensor.THERE
        machine = self.machines[cell.machine]
        machine.queue(cell, self.events.now_s, backward=False)
        self._wake(machine)

    def _input_failed(self, cell: Cell, epoch: int) -> None:
        if cell.epoch == epoch and not cell.lost:
            cell.input = Tensor.MISSING
            self._pull_input(cell)

    def _gradient_there(self, cell: Cell, epoch: int) -> None:
        if cell.epoch != epoch or cell.lost:
            return
        cell.gradient = Tensor.THERE
        if cell.forward_done:
            self._queue_backward(cell)

    def _gradient_failed(self, cell: Cell, epoch: int) -> None:
        if cell.epoch == epoch and not cell.lost:
            cell.gradient = Tensor.MISSING
            self._pull_gradient(cell)

    def _queue_backward(self, cell: Cell) -> None:
        machine = self.machines[cell.machine]
        machine.queue(cell, self.events.now_s, backward=True)
        self._wake(machine)

    def _wake(self, machine: Machine) -> None:
        if not machine.running and not machine.woken:
            machine.woken = True
            self.events.at(self.events.now_s, partial(self._look, machine), rank=_AFTER_ARRIVALS)

    def _look(self, machine: Machine) -> None:
        """Begin the machine's next pass, if there is one."""
        machine.woken = False
        if machine.running or (found := self._next_pass(machine)) is None:
            return
        cell, backward = found
        job, now_s, number = self.job, self.events.now_s, machine.number
        machine.running, machine.running_since_s, machine.running_step = True, now_s, self.step
        table = job.backward_s if backward else job.forward_s
        seconds = float(table[cell.stage, number])
        if backward:
            leaves_s = now_s + seconds - float(job.deferred_s[cell.stage, number])
            self.events.at(leaves_s, partial(self._gradient_leaves, cell, cell.epoch, machine.generation))
            cell.backwards += 1
            again = cell.backwards > 1
        else:
            machine.held[cell.stage] = machine.held.get(cell.stage, 0) + 1
            cell.begun = True
            cell.forwards += 1
            again = cell.forwards > 1
        if again:
            self.recomputed_s += seconds
        self.events.at(
            now_s + seconds, partial(self._pass_ends, machine, machine.generation, cell, cell.epoch, backward)
        )

    def _next_pass(self, machine: Machine) -> tuple[Cell, bool] | None:
        """Take the next pass. Each stage offers one; of those a backward goes first, then a later stage."""
        offered: list[tuple[bool, int]] = []
        for stage in {*machine.forwards, *machine.backwards}:
            most = self.room(stage, machine)
            if machine.held.get(stage, 0) < most and self._has_valid(machine, machine.forwards.get(stage)):
                offered.append((False, stage))
            elif self._has_valid(machine, machine.backwards.get(stage)):
                offered.append((True, stage))
        if not offered:
            return None
        backward, stage = max(offered)
        cell, _ = (machine.backwards if backward else machine.forwards)[stage].popleft()
        machine.note_waiting(self.events.now_s, -1)
        return cell, backward

    def _has_valid(self, machine: Machine, queue: deque[tuple[Cell, int]] | None) -> bool:
        """Return whether a pass waits in a queue, those that were withdrawn dropped."""
        while queue and queue[0][0].epoch != queue[0][1]:
            queue.popleft()
            machine.note_waiting(self.events.now_s, -1)
        return bool(queue)

    def _pass_ends(self, machine: Machine, generation: int, cell: Cell, epoch: int, backward: bool) -> None:
        if machine.generation != generation:
            return
        machine.running = False
        if self.on_pass is not None:
            self.on_pass(machine, cell, backward)
        machine.busy_s += self.events.now_s - machine.running_since_s
        self._wake(machine)
        if cell.epoch != epoch:
            return
        self.policy.computed(cell.stage, machine.number, backward=backward)
        if backward:
            self._backward_ends(machine, cell)
        else:
            self._forward_ends(machine, cell)

    def _forward_ends(self, machine: Machine, cell: Cell) -> None:
        cell.forward_done = True
        if cell.redo is Redo.NO:
            self._answer(machine, cell)
        if cell.redo is Redo.FORWARD:
            machine.held[cell.stage] -= 1
            cell.backward_done = True
            self.policy.withdrawn(cell.stage, machine.number, forward_done=True, backward_done=False)
        elif cell.stage + 1 == self.job.stages:
            cell.gradient = Tensor.THERE
            self._queue_backward(cell)
        elif cell.gradient is Tensor.THERE:
            self._queue_backward(cell)
        if cell.stage + 1 < self.job.stages:
            after = self.ledger.cells[cell.stage + 1][cell.microbatch]
            if after.machine == NOBODY and not after.stranded:
                self._route(after, machine.number)
            else:
                self._pull_input(after)

    def _answer(self, machine: Machine, cell: Cell) -> None:
        """Report a forward to the sender, who learns from it how long it took."""
        sender, sent_s = cell.sender, cell.sent_s
        delay_s = 0.0 if sender == DRIVER else float(self.job.delay_s[machine.number, sender])
        back_s = self.events.now_s + delay_s
        self.events.at(
            back_s, partial(self.policy.answered, sender, cell.stage, machine.number, back_s - sent_s), rank=-1
        )

    def _gradient_leaves(self, cell: Cell, epoch: int, generation: int) -> None:
        if cell.epoch != epoch or self.machines[cell.machine].generation != generation:
            return
        cell.gradient_out = True
        if cell.stage:
            before = self.ledger.cells[cell.stage - 1][cell.microbatch]
            if before.lost:
                self.on_gradient_to_gone(before)
            else:
                self._pull_gradient(before)

    def _backward_ends(self, machine: Machine, cell: Cell) -> None:
        cell.backward_done = True
        machine.held[cell.stage] -= 1
        if cell.redo is not Redo.NO:
            return
        self.ledger.count(cell)
        if cell.stage == 0:
            self._open.discard(cell.microbatch)
            self.inject()
        self.on_counted(cell.stage)
