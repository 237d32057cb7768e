"""A machine's part in a job: its stages, run round by round at the driver's command.

The event loop moves tensors and messages; the compute thread runs the passes. A round goes: `BeginRound` from the
driver, boundary tensors in and out until the ledger is complete, tied gradients exchanged with the other holders,
`RoundReport` to the driver, and for training `CommitRound` back, which applies the update. Whatever goes wrong ends
this machine's part and is told to the driver once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import msgspec

from fusionai.errors import FusionError, JobError, NetworkError, ProtocolError
from fusionai.execution.plane import Plane
from fusionai.execution.program import RoundProgram
from fusionai.graph.model import Transfer, ValueName, WeightKey
from fusionai.network.clock import now_s
from fusionai.network.identity import PeerId
from fusionai.pool.contacts import link_all
from fusionai.pool.job_wire import JobWire
from fusionai.scheduling.job_events import JobEvent, LinkLost, sentence
from fusionai.scheduling.recovery import PATIENCE, DropShare, EndJob, JobView, LookAgain, decide
from fusionai.tensor import TensorData
from fusionai.training.admission import check_round, check_weights
from fusionai.training.boundaries import Outgoing, check_source, check_type
from fusionai.training.compute import Compute, ComputeFactory, ComputeThread, Round
from fusionai.training.describe import stage_line
from fusionai.training.ledger import RoundLedger, Slot, Task
from fusionai.training.messages import (
    BeginRound,
    Boundary,
    Bulk,
    CommitRound,
    Control,
    EndShare,
    FinishLoading,
    HandOverWeights,
    InheritWeights,
    PulledWeight,
    PullWeights,
    RoundReport,
    ShareFailed,
    TiedGradient,
    WeightsHandedOver,
    WeightTensor,
)
from fusionai.training.roster import Roster
from fusionai.training.share import Share
from fusionai.training.slowdown import FULL_SPEED, Slowdown
from fusionai.training.tied_gradients import GradientExchange
from fusionai.training.weight_traffic import WeightTraffic

log = logging.getLogger(__name__)


_MOST_MICROBATCHES = 65_536
"""Bound on a round's ledger, whatever a driver asks for."""

_MOST_SIZES = 256
"""Sizes remembered as checked."""


class StageHost:
    """This machine's stages of one job. Make it with `create`."""

    def __init__(
        self,
        share: Share,
        roster: Roster,
        wire: JobWire,
        on_end: Callable[[str], Awaitable[None]],
        slowdown: Slowdown,
        limit_bytes: int,
        compute: ComputeFactory,
    ) -> None:
        self.share = share
        self.roster = roster
        self.description = "; ".join(stage_line(subdag) for subdag in share.subdags)
        self.bytes_sent: dict[str, int] = defaultdict(int)
        """Tensor bytes sent in this job, by receiving peer."""
        self.memory_bytes = 0
        self._wire = wire
        self._on_end = on_end
        self._limit_bytes = limit_bytes
        self._program: RoundProgram
        self._compute: Compute = compute(
            name=share.job,
            slowdown=slowdown,
            on_cpu=share.options.device == "cpu",
            on_pass=self._pass_done,
            on_complete=lambda current: self._own(self._round_done(current)),
            on_error=lambda error: self._own(self._fail(error)),
        )
        self._outgoing = Outgoing(wire, limit_bytes, self._own)
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_round = 0
        self._current: Round | None = None
        self._committing: Round | None = None
        self._begun = asyncio.Event()
        """Replaced at each round's begin; set for the one that has begun, and when this part is closed."""
        self._admitted: set[tuple[bool, tuple[tuple[str, int], ...]]] = set()
        self._tied: GradientExchange
        self._weights: WeightTraffic
        self._round_bytes: dict[str, int] = defaultdict(int)
        self._losses: dict[int, float] = {}
        self._closed = False

    @classmethod
    async def create(
        cls,
        share: Share,
        roster: Roster,
        plane: Plane,
        wire: JobWire,
        *,
        limit_bytes: int,
        slowdown: Slowdown = FULL_SPEED,
        on_end: Callable[[str], Awaitable[None]],
        compute: ComputeFactory = ComputeThread,
    ) -> StageHost:
        """Make the program of a share and take part in its job by a roster.

        `limit_bytes` is what this machine offers: for the program, and as much again for tensors that wait.
        `slowdown` stretches every pass (lab mode). `on_end(reason)` is awaited once when the driver
        ends the job, its machine is lost, or this part failed. `compute` makes what calls the program.

        Raises GraphError for operators that the plane cannot run, JobError for weights that exceed the limit.
        """
        check_weights(share, limit_bytes)
        host = cls(share, roster, wire, on_end, slowdown, limit_bytes, compute)
        try:
            host._program = await host._compute.call(lambda: plane.load(share.subdags, share.options))
        except BaseException:
            await host._compute.stop()
            raise
        host._compute.use(host._program)
        host._tied = GradientExchange(share, wire, host._compute, host._program, host._count_sent)
        host._weights = WeightTraffic(share, wire, host._compute, host._program, host._count_sent)
        wire.attach(roster.plan, host)
        return host

    @property
    def busy_s(self) -> float:
        """Compute seconds since the job began here."""
        return self._compute.busy_s

    def limit_memory(self, limit_bytes: int) -> None:
        """Take no more than this from now on; what no further round may exceed is checked anew."""
        if limit_bytes != self._limit_bytes:
            self._limit_bytes = self._outgoing.limit_bytes = limit_bytes
            self._admitted.clear()

    async def close(self, reason: str) -> None:
        """Stop, free the memory, forget the job. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._begun.set()
        log.info("job %s ends here: %s", self.roster.plan, reason)
        self._wire.detach(self.roster.plan, self)
        me = asyncio.current_task()
        others = [task for task in self._tasks if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._compute.stop()
        self._tied.clear()
        self._program.close()

    def take_roster(self, roster: Roster) -> bool:
        """Go on by a later roster; an older one, or one of this epoch, changes nothing and gives False.

        From then on messages of the new epoch are this machine's, and those of the old one are dropped.

        Raises:
            ProtocolError: a round is in progress, or a stage of this machine is another one's by the new roster.
        """
        if not roster.follows(self.roster):
            log.info("the roster of job %s is dropped: this machine goes by %s", roster.plan, self.roster.plan)
            return False
        if self._current is not None or self._committing is not None:
            raise ProtocolError("a roster is taken between two steps, and a round is in progress")
        for subdag in self.share.subdags:
            if roster.holder(subdag.index) != self._wire.me:
                raise ProtocolError(f"by the new roster stage {subdag.index} is not this machine's")
        self._wire.detach(self.roster.plan, self)
        self.roster = roster
        self._wire.attach(roster.plan, self)
        return True

    # --- Receiver -------------------------------------------------------------------------------------------

    def takes(self, message: object) -> bool:
        """Everything of training but what stages send to their driver."""
        return isinstance(message, Control | Bulk) and not isinstance(message, (RoundReport, ShareFailed, PulledWeight))

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        """Obey the driver."""
        if not self.roster.is_driver(peer):
            raise ProtocolError(f"{type(message).__name__} came from {peer[:12]}, which is not the driver")
        match message:
            case BeginRound():
                await self._begin(message)
            case CommitRound():
                self._commit(message)
            case FinishLoading():
                await self._weights.ready(message)
                await self.connect()
            case InheritWeights():
                self._weights.inherit(self.roster, message)
            case HandOverWeights():
                if self._current is not None or self._committing is not None:
                    raise ProtocolError("weights are handed over between two steps, and a round is in progress")
                return msgspec.msgpack.encode(WeightsHandedOver(await self._weights.hand_over(message)))
            case PullWeights():
                await self._weights.pull(self.roster, message)
            case EndShare():
                self._own(self._end(message.reason or "the driver ended the job"))
            case _:
                raise ProtocolError(f"a stage does not take {type(message).__name__}")
        return b""

    async def on_tensor(self, peer: PeerId, header: Bulk, tensor: TensorData) -> None:
        """Take a boundary tensor, a tied gradient, or a weight to load."""
        match header:
            case Boundary():
                check_source(self.roster, peer, header)
                current = await self._round_of(header.round)
                if current is not None:
                    self._accept(
                        current, header, tensor, limit_bytes=self._limit_bytes if peer != self._wire.me else None
                    )
            case TiedGradient():
                self._tied.check(self.roster, peer, header, tensor)
                current = await self._round_of(header.round)
                if current is not None and current.train:
                    self._tied.keep(peer, header, tensor)
            case WeightTensor():
                await self._weights.take(self.roster, peer, header, tensor)

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """A link is gone; what becomes of the job is for `scheduling.recovery` to say."""
        if self.roster.is_driver(peer) or self.roster.neighbour(peer) is not None:
            self._own(self._see_to(LinkLost(self._wire.me, peer, str(error), isinstance(error, ProtocolError))))

    async def _see_to(self, event: LinkLost) -> None:
        """Do what is to be done about a lost link, when its time has come."""
        waited_s = 0.0
        while True:
            actions = decide(self._view(event, waited_s), event)
            if not actions:
                return
            for action in actions:
                match action:
                    case LookAgain(seconds):
                        await asyncio.sleep(seconds)
                        waited_s += seconds
                    case DropShare(because):
                        await self._end(self._sentence(because))
                        return
                    case EndJob(because):
                        raise JobError(self._sentence(because))
                    case _:
                        raise AssertionError(f"a stage does not {type(action).__name__}")

    def _view(self, event: LinkLost, waited_s: float) -> JobView:
        return JobView(
            seen_by="stage",
            patience=PATIENCE,
            owner=self.roster.owner,
            driver=self.roster.driver,
            machines=frozenset(each.peer for each in self.roster.neighbours),
            waited_s=waited_s,
            mended=self._wire.linked(PeerId(event.there)),
        )

    def _sentence(self, event: JobEvent) -> str:
        def name(peer: str) -> str:
            contact = self.roster.neighbour(peer)
            return peer[:12] if contact is None else contact.name

        def who(peer: str) -> str:
            return "the owner's machine" if self.roster.is_driver(peer) else f"compnode {name(peer)}"

        return sentence(event, name=name, who=who)

    # --- the round --------------------------------------------------------------------------------------------

    async def _begin(self, message: BeginRound) -> None:
        if self._current is not None or self._committing is not None or message.round != self._next_round:
            raise ProtocolError(f"round {message.round} cannot begin; round {self._next_round} is next")
        count = len(message.loss_weights)
        if not 1 <= count <= _MOST_MICROBATCHES:
            raise ProtocolError(f"a round of {count} microbatches; at most {_MOST_MICROBATCHES} are allowed")
        try:
            await self._admit(message)
        except FusionError as error:
            self._own(self._fail(error))  # so that the driver hears why
            return
        if self._closed:
            return
        ledger = RoundLedger(self.share.subdags, count, self.share.in_flight, train=message.train)
        current = Round(message.round, message.step, message.train, message.sizes, message.loss_weights, ledger)
        self._next_round += 1
        self._current = current
        self._round_bytes.clear()
        self._losses = {}
        self._tied.clear()
        self._compute.begin(current)
        begun, self._begun = self._begun, asyncio.Event()
        begun.set()

    async def _admit(self, message: BeginRound) -> None:
        """Refuse sizes at which this share needs more memory than the machine offers, each pair of them once."""
        key = (message.train, tuple(sorted(message.sizes.items())))
        if key in self._admitted:
            return
        await asyncio.to_thread(
            check_round, self.share, message.sizes, train=message.train, limit_bytes=self._limit_bytes
        )
        if len(self._admitted) < _MOST_SIZES:
            self._admitted.add(key)

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
        subdag = self.share.subdag(header.target)
        if subdag is None:
            raise ProtocolError(f"stage {header.target} is not on this machine")
        check_type(subdag, header, tensor, current.sizes)
        slot = Slot(header.target, header.index, header.value, header.gradient, header.source)
        self._compute.deliver(slot, tensor, limit_bytes=limit_bytes)

    def _pass_done(self, current: Round, task: Task, outputs: dict[ValueName, TensorData]) -> None:
        subdag = self.share.subdag(task.stage)
        assert subdag is not None, "the ledger has this share's stages"
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
                self.roster.job,
                self.roster.epoch,
                current.number,
                task.turn.index,
                transfer.value,
                source,
                target,
                not forward,
                tensor.dtype,
                tensor.shape,
            )
            holder = self.roster.holder(target)
            assert holder is not None, "unpacking checked every transfer"
            self._post(holder, header, tensor)

    def _post(self, peer: PeerId, header: Boundary, tensor: TensorData) -> None:
        if peer == self._wire.me:
            self._accept_locally(header, tensor)
            return
        self._count_sent(peer, tensor.nbytes)
        self._outgoing.post(peer, header, tensor)

    def _count_sent(self, peer: str, nbytes: int) -> None:
        self.bytes_sent[peer] += nbytes
        self._round_bytes[peer] += nbytes

    def _accept_locally(self, header: Boundary, tensor: TensorData) -> None:
        assert self._current is not None
        try:
            self._accept(self._current, header, tensor)
        except FusionError as error:
            self._own(self._fail(error))

    async def _round_done(self, current: Round) -> None:
        norms: dict[WeightKey, float] = {}
        if current.train:
            await self._tied.sum(self.roster, current.number)
            others = self.roster.answered_elsewhere(self._wire.me)
            norms = await self._compute.call(lambda: self._program.gradient_norms(others))
            self._committing = current
        self.memory_bytes = await self._compute.call(self._program.memory_bytes)
        self._current = None
        report = RoundReport(
            self.roster.job,
            self.roster.epoch,
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
        await self._wire.notify(PeerId(self.roster.driver), report)

    def _commit(self, message: CommitRound) -> None:
        committing, self._committing = self._committing, None
        if committing is None or message.round != committing.number:
            raise ProtocolError(f"round {message.round} cannot be committed: it is not complete here")
        # Queued before this returns: the next round's first pass must find the updated weights.
        if message.apply:
            done = self._compute.submit(lambda: self._program.update(message.learning_rate, message.gradient_scale))
        else:
            done = self._compute.submit(self._program.discard)
        self._own(_finished(done))

    # --- links ----------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Link to every neighbour. Raises PeerTimeout or PeerLost naming the neighbour."""
        await link_all(self._wire.endpoint, self.roster.neighbours, called="compnode ")

    # --- ending -------------------------------------------------------------------------------------------------

    async def _fail(self, error: BaseException) -> None:
        """Tell the driver, then end."""
        if isinstance(error, FusionError):
            log.warning("job %s failed here: %s", self.roster.plan, error)
        else:
            log.error("job %s failed here", self.roster.plan, exc_info=error)
        name = type(error).__name__ if isinstance(error, FusionError) else "JobError"
        text = str(error) if isinstance(error, FusionError) else f"{type(error).__name__}: {error}"
        failed = ShareFailed(self.roster.job, self.roster.epoch, name, text[:2000])
        try:
            await self._wire.notify(PeerId(self.roster.driver), failed)
        except NetworkError:
            log.info("job %s: the driver is gone and cannot be told", self.roster.plan)
        await self._end(text)

    async def _end(self, reason: str) -> None:
        if self._closed:
            return
        await self.close(reason)
        await self._on_end(reason)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task of this host; its failure fails the job."""
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._closed:
            self._own(self._fail(error))


async def _finished(future: Future[None]) -> None:
    """Wait for a call to the program, raising what it raised."""
    await asyncio.wrap_future(future)


def _scalar(tensor: TensorData) -> float:
    """Return the value of a float32 scalar."""
    return float(memoryview(tensor.data).cast("B").cast("f")[0])
