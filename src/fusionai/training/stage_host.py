"""A machine's part in a job: its stages, run round by round at the driver's command.

The event loop moves tensors and messages; the compute thread runs the passes. A round goes: `BeginRound` from the
driver, boundary tensors in and out until the ledger is complete, tied gradients exchanged with the other holders,
`RoundReport` to the driver, and for training `CommitRound` back, which applies the update. Whatever goes wrong ends
this machine's part and is told to the driver once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from fusionai.errors import FusionError, JobError, NetworkError, ProtocolError
from fusionai.execution.plane import Plane
from fusionai.execution.program import RoundProgram
from fusionai.network.identity import PeerId
from fusionai.pool.contacts import link_all
from fusionai.pool.job_wire import JobWire
from fusionai.scheduling.job_events import LinkLost
from fusionai.scheduling.recovery import DropShare, EndJob
from fusionai.tensor import TensorData
from fusionai.training.admission import check_weights
from fusionai.training.compute import Compute, ComputeFactory, ComputeThread
from fusionai.training.describe import stage_line
from fusionai.training.lost_links import said, settled
from fusionai.training.messages import (
    BeginRound,
    Boundary,
    BulkHeader,
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
from fusionai.training.stage_rounds import StageRounds
from fusionai.training.weight_traffic import WeightTraffic

log = logging.getLogger(__name__)


class StageHost:
    """This machine's stages of one job. Make it with `create`."""

    def __init__(
        self,
        share: Share,
        roster: Roster,
        wire: JobWire,
        on_end: Callable[[str], Awaitable[None]],
        slowdown: Slowdown,
        compute: ComputeFactory,
    ) -> None:
        self.share = share
        self.roster = roster
        self.description = "; ".join(stage_line(subdag) for subdag in share.subdags)
        self._wire = wire
        self._on_end = on_end
        self._program: RoundProgram
        self._compute: Compute = compute(
            name=share.job,
            slowdown=slowdown,
            on_cpu=share.options.device == "cpu",
            on_pass=lambda *done: self._rounds.pass_done(*done),
            on_complete=lambda current: self._own(self._rounds.report(current)),
            on_error=lambda error: self._own(self._fail(error)),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._rounds: StageRounds
        self._weights: WeightTraffic
        self._closing: asyncio.Task[None] | None = None

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

        Raises GraphError for operators that the plane cannot run, JobError for weights that exceed the limit, and where
        this machine may take no other part in the job (`JobWire.seal`).
        """
        check_weights(share, limit_bytes)
        host = cls(share, roster, wire, on_end, slowdown, compute)
        try:
            host._program = await host._compute.call(lambda: plane.load(share.subdags, share.options))
        except BaseException:
            await host._compute.stop()
            raise
        host._compute.use(host._program)
        host._rounds = StageRounds(
            share,
            lambda: host.roster,
            wire,
            host._compute,
            host._program,
            limit_bytes=limit_bytes,
            start=host._own,
            fail=lambda error: host._own(host._fail(error)),
        )
        host._weights = WeightTraffic(share, wire, host._compute, host._program, host._rounds.count_sent)
        try:
            wire.attach(roster.plan, host)
        except BaseException:
            await host._compute.stop()
            host._program.close()
            raise
        return host

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Tensor bytes sent in this job, by receiving peer."""
        return self._rounds.bytes_sent

    @property
    def memory_bytes(self) -> int:
        """What the program held at the end of the last round."""
        return self._rounds.memory_bytes

    @property
    def busy_s(self) -> float:
        """Compute seconds since the job began here."""
        return self._compute.busy_s

    def limit_memory(self, limit_bytes: int) -> None:
        """Take no more than this from now on; what no further round may exceed is checked anew."""
        self._rounds.limit_memory(limit_bytes)

    async def close(self, reason: str) -> None:
        """Stop, free the memory, forget the job.

        May be called again, at the same time too: whenever a call returns, the memory is free. A caller that is
        cancelled stops waiting; the closing goes on.
        """
        if self._closing is None:
            self._rounds.close()
            log.info("job %s ends here: %s", self.roster.plan, reason)
            self._wire.detach(self.roster.plan, self)
            me = asyncio.current_task()
            others = [task for task in self._tasks if task is not me]
            for task in others:
                task.cancel()
            self._closing = asyncio.get_running_loop().create_task(self._free(others))
        await asyncio.shield(self._closing)

    async def _free(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Wait for cancelled tasks and the call in progress, then free the memory."""
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._compute.stop()
        self._rounds.exchange.clear()
        self._program.close()

    @property
    def _closed(self) -> bool:
        return self._closing is not None

    def take_roster(self, roster: Roster) -> bool:
        """Go on by a later roster; an older one, or one of this epoch, changes nothing and gives False.

        From then on messages of the new epoch are this machine's, and those of the old one are dropped.

        Raises:
            ProtocolError: a round is in progress, or a stage of this machine is another one's by the new roster.
        """
        if not roster.follows(self.roster):
            log.info("the roster of job %s is dropped: this machine goes by %s", roster.plan, self.roster.plan)
            return False
        if not self._rounds.idle:
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
        return isinstance(message, Control | BulkHeader) and not isinstance(
            message, (RoundReport, ShareFailed, PulledWeight)
        )

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        """Obey the driver."""
        if not self.roster.is_driver(peer):
            raise ProtocolError(f"{type(message).__name__} came from {peer[:12]}, which is not the driver")
        match message:
            case BeginRound():
                await self._rounds.begin(message)
            case CommitRound():
                self._rounds.commit(message)
            case FinishLoading():
                await self._weights.ready(message)
                await self.connect()
            case InheritWeights():
                self._weights.inherit(self.roster, message)
            case HandOverWeights():
                if not self._rounds.idle:
                    raise ProtocolError("weights are handed over between two steps, and a round is in progress")
                return msgspec.msgpack.encode(WeightsHandedOver(await self._weights.hand_over(message)))
            case PullWeights():
                await self._weights.pull(self.roster, message)
            case EndShare():
                self._own(self._end(message.reason or "the driver ended the job"))
            case _:
                raise ProtocolError(f"a stage does not take {type(message).__name__}")
        return b""

    async def on_tensor(self, peer: PeerId, header: BulkHeader, tensor: TensorData) -> None:
        """Take a boundary tensor, a tied gradient, or a weight to load."""
        match header:
            case Boundary():
                await self._rounds.take_boundary(peer, header, tensor)
            case TiedGradient():
                await self._rounds.take_tied(peer, header, tensor)
            case WeightTensor():
                await self._weights.take(self.roster, peer, header, tensor)

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """A link is gone; what becomes of the job is for `scheduling.recovery` to say."""
        if self.roster.is_driver(peer) or self.roster.neighbour(peer) is not None:
            event = LinkLost(self._wire.me, peer, str(error), isinstance(error, ProtocolError))
            self._own(self._see_to(event))

    async def _see_to(self, event: LinkLost) -> None:
        """Do what is to be done about a lost link, when its time has come. Raises JobError when it ends the job."""
        action = await settled(event, lambda: self.roster, self._wire)
        if isinstance(action, DropShare):
            await self._end(said(action.because, self.roster))
        elif isinstance(action, EndJob):
            raise JobError(said(action.because, self.roster))

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
