"""The rounds of a machine's stages: begun, fed, sent on, reported and committed, one at a time."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from fusionai.errors import FusionError, ProtocolError
from fusionai.execution.program import RoundProgram
from fusionai.graph.evaluation import face
from fusionai.graph.model import Transfer, ValueName, WeightKey
from fusionai.network.clock import now_s
from fusionai.network.identity import PeerId
from fusionai.pool.job_wire import JobWire
from fusionai.tensor import TensorData
from fusionai.training.admission import check_round
from fusionai.training.boundaries import Outgoing, check_source, check_type
from fusionai.training.compute import Compute, Round
from fusionai.training.ledger import ReadyPass, RoundLedger, Slot
from fusionai.training.messages import BeginRound, Boundary, CommitRound, RoundReport, TiedGradient
from fusionai.training.roster import Roster
from fusionai.training.share import Share
from fusionai.training.tied_gradients import GradientExchange

_MOST_MICROBATCHES = 65_536
"""Bound on a round's ledger, whatever a driver asks for."""

_MOST_SIZES = 256
"""Sizes remembered as checked."""


class StageRounds:
    """The round in progress on one machine, and the order of rounds."""

    def __init__(
        self,
        share: Share,
        roster: Callable[[], Roster],
        wire: JobWire,
        compute: Compute,
        program: RoundProgram,
        *,
        limit_bytes: int,
        start: Callable[[Coroutine[Any, Any, None]], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Prepare; no round has begun.

        Args:
            share: this machine's stages.
            roster: gives the roster that this machine goes by now.
            wire: carries the job's messages.
            compute: runs the passes.
            program: the share's.
            limit_bytes: what a round may take of this machine, and as much again for tensors that wait.
            start: runs a coroutine in the background, and ends the job's part here when it fails.
            fail: ends the job's part here.
        """
        self.bytes_sent: dict[str, int] = defaultdict(int)
        """Tensor bytes sent in this job, by receiving peer."""
        self.memory_bytes = 0
        """What the program held at the end of the last round."""
        self.exchange = GradientExchange(share, wire, compute, program, self.count_sent)
        """The gradients of tied weights."""
        self._share = share
        self._roster = roster
        self._wire = wire
        self._compute = compute
        self._program = program
        self._limit_bytes = limit_bytes
        self._start = start
        self._fail = fail
        self._outgoing = Outgoing(wire, limit_bytes, start)
        self._next_round = 0
        self._current: Round | None = None
        self._committing: Round | None = None
        self._begun = asyncio.Event()
        """Replaced at each round's begin; set for the one that has begun, and when this part is closed."""
        self._admitted: set[tuple[bool, tuple[tuple[str, int], ...]]] = set()
        self._round_bytes: dict[str, int] = defaultdict(int)
        self._losses: dict[int, float] = {}
        self._closed = False

    @property
    def idle(self) -> bool:
        """Whether no round is in progress, nor waits for its commit."""
        return self._current is None and self._committing is None

    def limit_memory(self, limit_bytes: int) -> None:
        """Take no more than this from now on; what no further round may exceed is checked anew."""
        if limit_bytes != self._limit_bytes:
            self._limit_bytes = self._outgoing.limit_bytes = limit_bytes
            self._admitted.clear()

    def close(self) -> None:
        """Begin no further round, and wake whoever waits for one."""
        self._closed = True
        self._begun.set()

    async def begin(self, message: BeginRound) -> None:
        """Begin a round. Raises ProtocolError when it is not the next one, or too large."""
        if self._current is not None or self._committing is not None or message.round != self._next_round:
            raise ProtocolError(f"round {message.round} cannot begin; round {self._next_round} is next")
        count = len(message.loss_weights)
        if not 1 <= count <= _MOST_MICROBATCHES:
            raise ProtocolError(f"a round of {count} microbatches; at most {_MOST_MICROBATCHES} are allowed")
        try:
            await self._admit(message)
        except FusionError as error:
            self._fail(error)  # so that the driver hears why
            return
        if self._closed:
            return
        ledger = RoundLedger(self._share.subdags, count, self._share.in_flight, train=message.train)
        current = Round(message.round, message.step, message.train, message.sizes, message.loss_weights, ledger)
        self._next_round += 1
        self._current = current
        self._round_bytes.clear()
        self._losses = {}
        self.exchange.clear()
        self._compute.begin(current)
        begun, self._begun = self._begun, asyncio.Event()
        begun.set()

    async def _admit(self, message: BeginRound) -> None:
        """Refuse sizes at which this share needs more memory than the machine offers, each pair of them once."""
        key = (message.train, tuple(sorted(message.sizes.items())))
        if key in self._admitted:
            return
        limit_bytes = self._limit_bytes
        await asyncio.to_thread(check_round, self._share, message.sizes, train=message.train, limit_bytes=limit_bytes)
        # The limit may have changed meanwhile, and what was checked against the old one is not remembered.
        if limit_bytes == self._limit_bytes and len(self._admitted) < _MOST_SIZES:
            self._admitted.add(key)

    # --- tensors that come --------------------------------------------------------------------------------------

    async def take_boundary(self, peer: PeerId, header: Boundary, tensor: TensorData) -> None:
        """Take a boundary tensor or an input. Raises ProtocolError unless it is the peer's to send and as declared."""
        check_source(self._roster(), peer, header)
        current = await self._round_of(header.round)
        if current is not None:
            self._accept(current, header, tensor, limit_bytes=self._limit_bytes if peer != self._wire.me else None)

    async def take_tied(self, peer: PeerId, header: TiedGradient, tensor: TensorData) -> None:
        """Take another holder's gradient of a tied weight. Raises ProtocolError when it is not the peer's to send."""
        self.exchange.check(self._roster(), peer, header, tensor)
        current = await self._round_of(header.round)
        if current is not None and current.train:
            self.exchange.keep(peer, header, tensor)

    async def _round_of(self, number: int) -> Round | None:
        """Return the round in progress if it has that number, None for one that is over; wait for the next one.

        A neighbour hears of a round before this machine does. It is held back then, by its credit, until this machine
        hears of it too, so that what comes early is bounded by the link's window.
        """
        if number > self._next_round:
            raise ProtocolError(f"a tensor of round {number} came, but round {self._next_round} is next")
        while number == self._next_round and not self._closed:
            await self._begun.wait()
        return self._current if self._current is not None and self._current.number == number else None

    def _accept(self, current: Round, header: Boundary, tensor: TensorData, *, limit_bytes: int | None = None) -> None:
        subdag = self._share.subdag(header.target)
        if subdag is None:
            raise ProtocolError(f"stage {header.target} is not on this machine")
        check_type(face(subdag, current.train), header, tensor, current.sizes)
        slot = Slot(header.target, header.index, header.value, header.gradient, header.source)
        self._compute.deliver(slot, tensor, limit_bytes=limit_bytes)

    # --- tensors that go ----------------------------------------------------------------------------------------

    def pass_done(self, current: Round, task: ReadyPass, outputs: dict[ValueName, TensorData]) -> None:
        """Send what a pass gave to the stages that need it."""
        roster = self._roster()
        held = self._share.subdag(task.stage)
        assert held is not None, "the ledger has this share's stages"
        subdag = face(held, current.train)
        forward = task.turn.direction == "forward"
        if forward and subdag.loss is not None:
            self._losses[task.turn.index] = _scalar(outputs[subdag.loss])
        transfers: tuple[Transfer, ...] = subdag.sends if forward else subdag.receives
        for transfer in transfers:
            if not forward and not transfer.gradient:
                continue
            tensor = outputs[transfer.value]
            source, target = (transfer.source, transfer.target) if forward else (transfer.target, transfer.source)
            header = Boundary(
                roster.job,
                roster.epoch,
                current.number,
                task.turn.index,
                transfer.value,
                source,
                target,
                not forward,
                tensor.dtype,
                tensor.shape,
            )
            holder = roster.holder(target)
            assert holder is not None, "unpacking checked every transfer"
            self._post(holder, header, tensor)

    def _post(self, peer: PeerId, header: Boundary, tensor: TensorData) -> None:
        if peer == self._wire.me:
            self._accept_locally(header, tensor)
            return
        self.count_sent(peer, tensor.nbytes)
        self._outgoing.post(peer, header, tensor)

    def count_sent(self, peer: str, nbytes: int) -> None:
        """Count tensor bytes that go to another machine."""
        self.bytes_sent[peer] += nbytes
        self._round_bytes[peer] += nbytes

    def _accept_locally(self, header: Boundary, tensor: TensorData) -> None:
        assert self._current is not None
        try:
            self._accept(self._current, header, tensor)
        except FusionError as error:
            self._fail(error)

    # --- the end of a round -------------------------------------------------------------------------------------

    async def report(self, current: Round) -> None:
        """Sum tied gradients, and tell the driver that every pass of a round is done."""
        roster = self._roster()
        norms: dict[WeightKey, float] = {}
        if current.train:
            await self.exchange.sum(roster, current.number)
            others = roster.answered_elsewhere(self._wire.me)
            norms = await self._compute.call(lambda: self._program.gradient_norms(others))
            self._committing = current
        self.memory_bytes = await self._compute.call(self._program.memory_bytes)
        self._current = None
        done = RoundReport(
            roster.job,
            roster.epoch,
            current.number,
            dict(self._losses),
            norms,
            current.busy_s,
            now_s() - current.started_s,
            dict(self._round_bytes),
            self.memory_bytes,
            dict(current.forward_s),
            dict(current.backward_s),
        )
        await self._wire.notify(PeerId(roster.driver), done)

    def commit(self, message: CommitRound) -> None:
        """Apply a round's update, or drop its gradients. Raises ProtocolError when the round is not complete here."""
        committing, self._committing = self._committing, None
        if committing is None or message.round != committing.number:
            raise ProtocolError(f"round {message.round} cannot be committed: it is not complete here")
        # Queued before this returns: the next round's first pass must find the updated weights.
        if message.apply:
            done = self._compute.submit(lambda: self._program.update(message.learning_rate, message.gradient_scale))
        else:
            done = self._compute.submit(self._program.discard)
        self._start(_finished(done))


async def _finished(future: Future[None]) -> None:
    """Wait for a call to the program, raising what it raised."""
    await asyncio.wrap_future(future)


def _scalar(tensor: TensorData) -> float:
    """Return the value of a float32 scalar."""
    return float(memoryview(tensor.data).cast("B").cast("f")[0])
