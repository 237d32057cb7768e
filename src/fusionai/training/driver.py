"""The driver of a job: feeds microbatches, commits steps, collects weights. Runs on the owner's machine.

The driver holds the job's side of the step transaction. A step is begun on every machine of the plan; each reports once
its ledger is complete; the driver checks that loss and gradients are finite, computes the clipping factor
from the global norm, and commits the update everywhere, or drops the step everywhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import msgspec

from fusionai.errors import DataError, JobError, NetworkError, PeerLost, ProtocolError
from fusionai.execution.plane import Clipping
from fusionai.graph.model import OpDag, Sizes, WeightKey
from fusionai.network.clock import now_s
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId
from fusionai.pool.job_wire import JobWire
from fusionai.scheduling.job_events import Failed, JobEvent, LinkLost, Misreported, Stalled, sentence
from fusionai.scheduling.recovery import PATIENCE, EndJob, JobView, LookAgain, decide
from fusionai.tensor import TensorData
from fusionai.training.data.batches import Batch
from fusionai.training.machine import Machine, sizes_of
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
    WeightsHandedOver,
    WeightTensor,
)
from fusionai.training.reports import flaw, printable, total
from fusionai.training.roster import DRIVER

__all__ = ["Driver", "Machine", "RoundResult", "WeightSource", "sizes_of"]

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
"""How long all machines may take to load their last weights and link to each other."""

PULL_TIMEOUT_S = PATIENCE.tensor_s
"""How long one machine's weights may take to be sent."""


class WeightSource(Protocol):
    """Where the weights that training starts from come from."""

    def read(self, name: str) -> TensorData:
        """Return a weight by its key. Blocks."""


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round gave."""

    loss: float
    """Weighted mean over the microbatches."""
    gradient_norm: float
    """Global norm before clipping; 0 in an evaluation."""
    gradient_scale: float
    """What clipping multiplies the gradients by."""
    seconds: float
    reports: Mapping[str, RoundReport]
    """By peer."""
    fed_bytes: Mapping[str, int]
    """Bytes of graph inputs that the driver sent to other machines, by receiving peer."""


class Driver:
    """Drives one job by one plan, from the loading of weights to the last pull."""

    def __init__(
        self,
        plan: JobEpoch,
        wire: JobWire,
        graph: OpDag,
        machines: Sequence[Machine],
        *,
        gradient_clip: float,
        clipping: Callable[[Sequence[float], float], Clipping],
    ) -> None:
        """`clipping` is the owner's plane's: gradients are clipped as its framework does it, to `gradient_clip`."""
        self.job: JobId = plan.job
        self.epoch: Epoch = plan.epoch
        self.machines = tuple(machines)
        self._wire = wire
        self._graph = graph
        self._clip = gradient_clip
        self._clipping = clipping
        self._readers = [
            (machine.peer, subdag.index, item.name)
            for machine in machines
            for subdag in machine.subdags
            for item in subdag.inputs
            if item.role != "positions"
        ]
        self._order = tuple(dict.fromkeys(weight.key for weight in graph.weights if weight.trainable))
        self._round = 0
        self._fed_bytes: dict[str, int] = {}
        self._microbatches = 0
        self._longest_s = 0.0
        self._reports: dict[str, RoundReport] = {}
        self._reported = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sink: Callable[[PeerId, PulledWeight, TensorData], Awaitable[None]] | None = None
        wire.attach(plan, self)

    # --- Receiver ---------------------------------------------------------------------------------------------

    def takes(self, message: object) -> bool:
        """What stages send to their driver."""
        return isinstance(message, (RoundReport, ShareFailed, PulledWeight))

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        """Take a report or a failure from a machine of this job."""
        machine = self._machine(peer)
        if isinstance(message, RoundReport):
            if message.round == self._round and peer not in self._reports:
                others = {self._wire.me, *(each.peer for each in self.machines)}
                problem = flaw(message, machine.subdags, self._microbatches, others)
                if problem is not None:
                    self.happened(Misreported(peer, problem))
                    return b""
                self._reports[peer] = message
                self._reported.set()
        elif isinstance(message, ShareFailed):
            self.happened(Failed(peer, printable(message.text)))
        return b""

    async def on_tensor(self, peer: PeerId, header: Bulk, tensor: TensorData) -> None:
        """Pass a pulled tensor on to whoever pulls."""
        machine = self._machine(peer)
        if not isinstance(header, PulledWeight) or self._sink is None or header.key not in machine.keys:
            raise ProtocolError(f"compnode {machine.name} sent a tensor that was not asked for")
        await self._sink(peer, header, tensor)

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """A link is gone; of a machine of the job that is an event."""
        if any(machine.peer == peer for machine in self.machines):
            self.happened(LinkLost(self._wire.me, peer, str(error)))

    def happened(self, event: JobEvent, *, waited_s: float = 0.0) -> None:
        """Do what is to be done about an event (`scheduling.recovery`).

        When it ends the job, whatever is awaited raises JobError with the event's sentence. The first such event
        counts.
        """
        for action in decide(self._view(event, waited_s), event):
            if isinstance(action, LookAgain):
                later = partial(self.happened, event, waited_s=waited_s + action.seconds)
                asyncio.get_running_loop().call_later(action.seconds, later)
            elif isinstance(action, EndJob) and not self._failure.done():
                self._failure.set_exception(JobError(self._sentence(action.because)))
                self._failure.exception()  # somebody awaits it, or nobody needs to

    def _view(self, event: JobEvent, waited_s: float = 0.0) -> JobView:
        mended = isinstance(event, LinkLost) and self._wire.linked(PeerId(event.there))
        return JobView(seen_by="driver", patience=PATIENCE, driver=self._wire.me, waited_s=waited_s, mended=mended)

    def _sentence(self, event: JobEvent) -> str:
        machines = {machine.peer: machine for machine in self.machines}

        def name(peer: str) -> str:
            return machines[PeerId(peer)].name

        def who(peer: str) -> str:
            return f"compnode {name(peer)} ({machines[PeerId(peer)].holding})"

        return sentence(event, name=name, who=who)

    @property
    def failed(self) -> bool:
        """Whether the job cannot go on."""
        return self._failure.done()

    async def check(self) -> None:
        """Raise what has ended the job, if anything has."""
        if self._failure.done():
            await self._failure

    # --- life cycle ---------------------------------------------------------------------------------------------

    async def prepare(
        self, weights: WeightSource, *, optimizer_states: Sequence[str] = (), optimizer_step: int = 0
    ) -> None:
        """Send every machine its weights (and optimizer states when resuming), and link them all.

        States are read as "<key>::<state>"; a missing one is left at its start.
        """

        async def load(machine: Machine) -> None:
            count = await self._load(machine, weights, optimizer_states)
            await self._ask(
                machine, FinishLoading(self.job, self.epoch, count, optimizer_step), timeout_s=READY_TIMEOUT_S
            )

        await self.guard(asyncio.gather(*(load(each) for each in self.machines)))

    async def _load(self, machine: Machine, weights: WeightSource, states: Sequence[str]) -> int:
        """Send a machine its tensors; return how many."""
        count = 0
        trainable = {weight.key for subdag in machine.subdags for weight in subdag.weights if weight.trainable}
        for key in machine.keys:
            for state in (None, *(states if key in trainable else ())):
                name = key if state is None else f"{key}::{state}"
                tensor = await asyncio.to_thread(weights.read, name)
                header = WeightTensor(self.job, self.epoch, key, state, tensor.dtype, tensor.shape)
                await self._wire.send(machine.peer, header, tensor)
                count += 1
        return count

    async def inherit(self, sources: Mapping[str, Mapping[WeightKey, str]]) -> None:
        """Tell each machine whence its weights come, instead of sending them: see `handing_over`."""
        await self.guard(
            asyncio.gather(
                *(
                    self._ask(
                        each, InheritWeights(self.job, self.epoch, dict(sources[each.peer])), timeout_s=READY_TIMEOUT_S
                    )
                    for each in self.machines
                )
            )
        )

    async def give(self, to: Epoch, targets: Mapping[str, Mapping[WeightKey, tuple[str, ...]]]) -> int:
        """Have each machine send its weights and states to those of the new plan `to`; return the bytes sent."""
        total_bytes = 0

        async def send(machine: Machine) -> None:
            nonlocal total_bytes
            message = HandOverWeights(self.job, self.epoch, to, dict(targets[machine.peer]))
            answer = await self._ask(machine, message, timeout_s=PULL_TIMEOUT_S)
            try:
                sent = msgspec.msgpack.decode(answer, type=WeightsHandedOver).bytes_sent
            except msgspec.MsgspecError as error:
                raise JobError(f"compnode {machine.name} tells nothing sensible of its hand-over: {error}") from error
            total_bytes += sum(sent.values())

        await self.guard(asyncio.gather(*(send(each) for each in self.machines if targets.get(each.peer))))
        return total_bytes

    async def settle(self, tensors: Mapping[str, int], *, optimizer_step: int) -> None:
        """Wait until each machine has so many tensors by peer, and is linked to its neighbours."""
        await self.guard(
            asyncio.gather(
                *(
                    self._ask(
                        each,
                        FinishLoading(self.job, self.epoch, tensors[each.peer], optimizer_step),
                        timeout_s=READY_TIMEOUT_S,
                    )
                    for each in self.machines
                )
            )
        )

    async def train_step(
        self, step: int, batch: Sequence[Batch], weights: Sequence[float], learning_rate: float
    ) -> RoundResult:
        """Run one training step on its microbatches; raises JobError when loss or gradients are not finite.

        `weights` are the microbatches' shares in the step's loss and add up to 1. On such an error no machine has
        applied the step.
        """
        result = await self._run_round(step, batch, weights, train=True)
        finite = math.isfinite(result.loss) and math.isfinite(result.gradient_norm)
        await self._tell(
            CommitRound(self.job, self.epoch, self._round - 1, learning_rate, result.gradient_scale, finite)
        )
        if not finite:
            what = "the loss" if not math.isfinite(result.loss) else "the norm of the gradients"
            value = result.loss if not math.isfinite(result.loss) else result.gradient_norm
            source = "" if what == "the loss" else self._source(result)
            raise JobError(
                f"{what} is {value}{source} at step {step + 1}; the step was not applied. Lower "
                "training.learning_rate, or set training.gradient_clip, and resume from the last good checkpoint"
            )
        return result

    def _source(self, result: RoundResult) -> str:
        """Name the machines whose gradients are not finite; where it is all of them, the trouble is everybody's."""
        reports = result.reports
        names = [
            each.name
            for each in self.machines
            if not all(math.isfinite(norm) for norm in reports[each.peer].norms.values())
        ]
        return f" (gradients of {', '.join(names)})" if 0 < len(names) < len(self.machines) else ""

    async def evaluate(self, batch: Sequence[Batch], weights: Sequence[float]) -> RoundResult:
        """Return the loss on held-out microbatches; changes nothing."""
        return await self._run_round(0, batch, weights, train=False)

    async def _run_round(
        self, step: int, batch: Sequence[Batch], weights: Sequence[float], *, train: bool
    ) -> RoundResult:
        start_s = now_s()
        self._reports.clear()
        self._microbatches = len(batch)
        self._fed_bytes.clear()
        begin = BeginRound(self.job, self.epoch, self._round, step, train, self._sizes(batch), tuple(weights))
        await self._tell(begin)
        feeding = asyncio.ensure_future(self._feed(batch))
        try:
            await self.guard(feeding)
            await self.guard(self._all_reported())
        finally:
            feeding.cancel()
        self._round += 1
        seconds = now_s() - start_s
        self._longest_s = max(self._longest_s, seconds)
        losses = {index: loss for report in self._reports.values() for index, loss in report.losses.items()}
        if losses.keys() != set(range(len(batch))):
            raise JobError(f"the losses of microbatches {sorted(set(range(len(batch))) - losses.keys())} did not come")
        norms = {key: norm for report in self._reports.values() for key, norm in report.norms.items()}
        clipping = self._clipping([norms[key] for key in self._order if key in norms], self._clip)
        return RoundResult(
            loss=total(weights[index] * loss for index, loss in losses.items()),
            gradient_norm=clipping.norm,
            gradient_scale=clipping.factor,
            seconds=seconds,
            reports=dict(self._reports),
            fed_bytes=dict(self._fed_bytes),
        )

    async def _feed(self, batch: Sequence[Batch]) -> None:
        """Give every stage the graph inputs that it reads."""
        for index, microbatch in enumerate(batch):
            for peer, stage, name in self._readers:
                tensor = microbatch[name]
                header = Boundary(
                    self.job, self.epoch, self._round, index, name, DRIVER, stage, False, tensor.dtype, tensor.shape
                )
                await self._wire.send(peer, header, tensor)
                if peer != self._wire.me:
                    self._fed_bytes[peer] = self._fed_bytes.get(peer, 0) + tensor.nbytes

    async def _all_reported(self) -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        while silent := tuple(each.peer for each in self.machines if each.peer not in self._reports):
            self._reported.clear()
            waited_s = loop.time() - start_s
            stalled = Stalled(silent, "report", waited_s, self._longest_s)
            await self._patiently(self._reported, stalled)

    async def _patiently(self, awaited: asyncio.Event, stalled: Stalled) -> None:
        """Wait for an event as long as the policy has patience. Raises JobError then."""
        while True:
            (action,) = decide(self._view(stalled), stalled)
            if not isinstance(action, LookAgain):
                raise JobError(self._sentence(stalled))
            try:
                await asyncio.wait_for(awaited.wait(), action.seconds)
                return
            except TimeoutError:
                stalled = replace(stalled, waited_s=stalled.waited_s + action.seconds)

    def _sizes(self, batch: Sequence[Batch]) -> Sizes:
        """Return the numbers of the graph's symbols, checking that all microbatches have one shape."""
        sizes = sizes_of(self._graph, batch[0])
        if any(sizes_of(self._graph, microbatch) != sizes for microbatch in batch):
            raise DataError("the microbatches of a step must all have one shape")
        return sizes

    async def pull(
        self,
        states: Sequence[str],
        sink: Callable[[WeightKey, str | None, TensorData], Awaitable[None]],
    ) -> None:
        """Hand every weight that some machine holds, and with it its optimizer states, to `sink`, each once.

        One tensor at a time comes from each machine, so no more than that is ever in memory.
        """
        seen: set[WeightKey] = set()
        missing: set[tuple[WeightKey, str | None]] = set()
        arrived = asyncio.Event()
        asked = self._wire.me

        async def take(peer: PeerId, header: PulledWeight, tensor: TensorData) -> None:
            if peer != asked or (header.key, header.state) not in missing:
                raise ProtocolError(f"{header.key!r} was not asked for, or came twice")
            await sink(header.key, header.state, tensor)
            missing.discard((header.key, header.state))
            arrived.set()

        async def all_here() -> None:
            # Bulk and control are not ordered against each other: an answer may overtake its tensors.
            while missing:
                arrived.clear()
                await self._patiently(arrived, Stalled((asked,), "tensor", 0.0))

        self._sink = take
        try:
            for machine in self.machines:
                asked = machine.peer
                wanted: list[tuple[WeightKey, str | None]] = []
                for subdag in machine.subdags:
                    for weight in subdag.weights:
                        if weight.key not in seen and weight.kind != "constant":
                            seen.add(weight.key)
                            wanted.append((weight.key, None))
                            wanted += [(weight.key, state) for state in states if weight.trainable]
                missing.update(wanted)
                await self.guard(
                    self._ask(machine, PullWeights(self.job, self.epoch, tuple(wanted)), timeout_s=PULL_TIMEOUT_S)
                )
                await self.guard(all_here())
        finally:
            self._sink = None

    async def close(self, reason: str) -> None:
        """End the job on every machine that can still be reached."""
        for machine in self.machines:
            try:
                await self._wire.notify(machine.peer, EndShare(self.job, self.epoch, reason))
            except (NetworkError, ProtocolError):
                log.debug("job %s: %s is gone already", self.job, machine.name)
        self._wire.detach(JobEpoch(self.job, self.epoch), self)
        self._failure.cancel()

    # --- talking to machines --------------------------------------------------------------------------------------

    async def _tell(self, message: BeginRound | CommitRound) -> None:
        for machine in self.machines:
            try:
                await self._wire.notify(machine.peer, message)
            except PeerLost as error:
                self.happened(LinkLost(self._wire.me, machine.peer, str(error)))
        if self._failure.done():
            await self._failure

    async def _ask(
        self,
        machine: Machine,
        message: FinishLoading | InheritWeights | HandOverWeights | PullWeights,
        *,
        timeout_s: float,
    ) -> bytes:
        try:
            return await self._wire.request(machine.peer, message, timeout_s=timeout_s)
        except NetworkError as error:
            raise JobError(f"compnode {machine.name} ({machine.holding}): {error}") from error

    async def guard(self, work: Awaitable[object]) -> None:
        """Await `work`, or raise what ended the job meanwhile."""
        task: asyncio.Future[object] = asyncio.ensure_future(work)
        waited: set[asyncio.Future[Any]] = {task, self._failure}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self._failure
            await task
        except PeerLost as error:
            # The close of the link is on its way to `on_peer_closed`, which knows the machine's name.
            await asyncio.wait({self._failure}, timeout=1.0)
            if self._failure.done():
                await self._failure
            raise JobError(f"a compnode is lost: {error}") from error
        finally:
            task.cancel()
            await asyncio.wait({task})

    def _machine(self, peer: PeerId) -> Machine:
        for machine in self.machines:
            if machine.peer == peer:
                return machine
        raise ProtocolError(f"{peer[:12]} has no part in job {self.job!r}")
