"""The driver of a job: feeds microbatches, commits steps, collects weights. Runs on the owner's machine.

The driver holds the job's side of the step transaction. A step is begun on every machine of the plan; each reports once
its ledger is complete; the driver checks that loss and gradients are finite, computes the clipping factor
from the global norm, and commits the update everywhere, or drops the step everywhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fusionai.errors import DataError, JobError, NetworkError, ProtocolError
from fusionai.execution.plane import Clipping
from fusionai.graph.evaluation import face
from fusionai.graph.model import OpDag, Sizes, ValueName
from fusionai.network.clock import now_s
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId
from fusionai.pool.job_wire import JobWire
from fusionai.scheduling.job_events import Failed, JobEvent, Misreported, Stalled
from fusionai.tensor import TensorData
from fusionai.training.data.batches import Batch
from fusionai.training.job_watch import JobWatch
from fusionai.training.machine import Machine, sizes_of
from fusionai.training.messages import (
    BeginRound,
    Boundary,
    BulkHeader,
    CommitRound,
    Control,
    EndShare,
    PulledWeight,
    RoundReport,
    ShareFailed,
)
from fusionai.training.reports import flaw, printable, total
from fusionai.training.roster import DRIVER
from fusionai.training.weight_orders import WeightOrders, WeightSink, WeightSource

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round gave."""

    loss: float
    """Sum over the microbatches of share times loss: the loss of the whole batch."""
    gradient_norm: float
    """Global norm before clipping; 0 in an evaluation."""
    gradient_scale: float
    """What clipping multiplies the gradients by."""
    seconds: float
    reports: Mapping[str, RoundReport]
    """By peer."""
    fed_bytes: Mapping[str, int]
    """Bytes of graph inputs that the driver sent to other machines, by receiving peer."""
    microbatches: int
    """Microbatches that were run: those with a share."""


class Driver:
    """Drives one job by one plan, from the loading of weights to the last pull."""

    def __init__(
        self,
        plan: JobEpoch,
        wire: JobWire,
        graph: OpDag,
        machines: Sequence[Machine],
        *,
        privacy: Literal["private", "open"],
        gradient_clip: float,
        clipping: Callable[[Sequence[float], float], Clipping],
    ) -> None:
        """Drive a job from now on.

        Args:
            plan: names the plan on the wire.
            wire: reaches all its machines.
            graph: the whole OP-DAG.
            machines: who holds which stages.
            privacy: of a "private" job no private input is ever sent to another machine, whoever holds the stage that
                reads it.
            gradient_clip: norm to which gradients are clipped.
            clipping: the owner's plane's: gradients are clipped as its framework does it.

        Raises JobError when another machine holds a stage that reads a private input of a private job.
        """
        self.job: JobId = plan.job
        self.epoch: Epoch = plan.epoch
        self.machines = tuple(machines)
        self._wire = wire
        self._graph = graph
        self._kept_here = frozenset(item.name for item in graph.inputs if item.private and privacy == "private")
        """Inputs that are sent to nobody."""
        self._clip = gradient_clip
        self._clipping = clipping
        self._readers = {
            train: [
                (machine.peer, subdag.index, item.name)
                for machine in machines
                for subdag in machine.subdags
                for item in face(subdag, train).inputs
                if item.role != "positions"
            ]
            for train in (True, False)
        }
        """By mode, training or evaluation: who is fed what."""
        for peer, stage, name in (*self._readers[True], *self._readers[False]):
            self._check_may_get(peer, stage, name)
        self._order = tuple(dict.fromkeys(weight.key for weight in graph.weights if weight.trainable))
        self._round = 0
        self._fed_bytes: dict[str, int] = {}
        self._microbatches = 0
        self._training = True
        """Whether the round in progress trains."""
        self._longest_s = 0.0
        self._reports: dict[str, RoundReport] = {}
        self._reported = asyncio.Event()
        self._at_rest = True
        self.watch = JobWatch(plan.job, wire, self.machines)
        """Knows whether the job still lives."""
        self.weights = WeightOrders(plan, wire, self.watch)
        """Has the machines load weights, hand them over, and give them back."""
        wire.attach(plan, self)

    # --- Receiver ---------------------------------------------------------------------------------------------

    def takes(self, message: object) -> bool:
        """What stages send to their driver."""
        return isinstance(message, (RoundReport, ShareFailed, PulledWeight))

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        """Take a report or a failure from a machine of this job."""
        machine = self.watch.machine(peer)
        if isinstance(message, RoundReport):
            if message.round == self._round and peer not in self._reports:
                others = {self._wire.me, *(each.peer for each in self.machines)}
                stages = [face(subdag, self._training) for subdag in machine.subdags]
                problem = flaw(message, stages, self._microbatches, others)
                if problem is not None:
                    self.happened(Misreported(peer, problem))
                    return b""
                self._reports[peer] = message
                self._reported.set()
        elif isinstance(message, ShareFailed):
            self.happened(Failed(peer, printable(message.text)))
        return b""

    async def on_tensor(self, peer: PeerId, header: BulkHeader, tensor: TensorData) -> None:
        """Pass a pulled tensor on to whoever pulls."""
        await self.weights.take(self.watch.machine(peer), header, tensor)

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """A link is gone."""
        self.watch.link_lost(peer, error)

    def happened(self, event: JobEvent) -> None:
        """Do what is to be done about an event; see `JobWatch.happened`."""
        self.watch.happened(event)

    @property
    def at_rest(self) -> bool:
        """Whether all machines live and hold the state after the last committed step: no round is under way."""
        return self._at_rest and not self.watch.failed

    # --- life cycle ---------------------------------------------------------------------------------------------

    async def prepare(
        self, weights: WeightSource, *, optimizer_states: Sequence[str] = (), optimizer_step: int = 0
    ) -> None:
        """Send every machine its weights (and optimizer states when resuming), and link them all.

        States are read as "<key>::<state>"; a missing one is left at its start.
        """
        await self.weights.load(weights, optimizer_states, optimizer_step=optimizer_step)

    async def train_step(
        self, step: int, batch: Sequence[Batch], weights: Sequence[float], learning_rate: float
    ) -> RoundResult:
        """Run one training step on its microbatches; raises JobError when loss or gradients are not finite.

        `weights` are the microbatches' shares in the step's loss. Microbatches with share 0 are not run. On such an
        error no machine has applied the step.
        """
        result = await self._run_round(step, batch, weights, train=True)
        finite = math.isfinite(result.loss) and math.isfinite(result.gradient_norm)
        await self.watch.tell(
            CommitRound(self.job, self.epoch, self._round - 1, learning_rate, result.gradient_scale, finite)
        )
        self._at_rest = True
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
        """Return the loss on held-out microbatches, weighed as in `train_step`.

        Only buffers change that the model writes to in evaluation mode.
        """
        result = await self._run_round(0, batch, weights, train=False)
        self._at_rest = True
        return result

    async def _run_round(
        self, step: int, batch: Sequence[Batch], weights: Sequence[float], *, train: bool
    ) -> RoundResult:
        start_s = now_s()
        sizes = self._sizes(batch)
        # A loss that nothing counts in may be 0/0, and 0 times that would be in the sum.
        run = [(microbatch, weight) for microbatch, weight in zip(batch, weights, strict=True) if weight]
        if not run:
            raise DataError(f"none of the {len(batch)} microbatches has a share in the loss")
        batch, weights = [microbatch for microbatch, _ in run], [weight for _, weight in run]
        self._reports.clear()
        self._microbatches, self._training = len(batch), train
        self._fed_bytes.clear()
        begin = BeginRound(self.job, self.epoch, self._round, step, train, sizes, tuple(weights))
        self._at_rest = False
        await self.watch.tell(begin)
        feeding = asyncio.ensure_future(self._feed(batch, train=train))
        try:
            await self.watch.guard(feeding)
            await self.watch.guard(self._all_reported())
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
            microbatches=len(batch),
        )

    async def _feed(self, batch: Sequence[Batch], *, train: bool) -> None:
        """Give every stage the graph inputs that it reads."""
        for index, microbatch in enumerate(batch):
            for peer, stage, name in self._readers[train]:
                self._check_may_get(peer, stage, name)
                tensor = microbatch[name]
                header = Boundary(
                    self.job, self.epoch, self._round, index, name, DRIVER, stage, False, tensor.dtype, tensor.shape
                )
                await self._wire.send(peer, header, tensor)
                if peer != self._wire.me:
                    self._fed_bytes[peer] = self._fed_bytes.get(peer, 0) + tensor.nbytes

    def _check_may_get(self, peer: PeerId, stage: int, name: ValueName) -> None:
        """Refuse to send a private input of a private job to another machine. Raises JobError."""
        if name in self._kept_here and peer != self._wire.me:
            raise JobError(
                f"stage {stage} on {peer[:12]} reads {name!r}, which a private job sends to no other machine; nothing "
                "was sent. The plan is faulty: use a broker that you trust"
            )

    async def _all_reported(self) -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        while silent := tuple(each.peer for each in self.machines if each.peer not in self._reports):
            self._reported.clear()
            waited_s = loop.time() - start_s
            stalled = Stalled(silent, "report", waited_s, self._longest_s)
            await self.watch.patiently(self._reported, stalled)

    def _sizes(self, batch: Sequence[Batch]) -> Sizes:
        """Return the numbers of the graph's symbols, checking that all microbatches have one shape."""
        sizes = sizes_of(self._graph, batch[0])
        if any(sizes_of(self._graph, microbatch) != sizes for microbatch in batch):
            raise DataError("the microbatches of a step must all have one shape")
        return sizes

    async def pull(self, states: Sequence[str], sink: WeightSink) -> None:
        """Hand every weight and its optimizer states to `sink`, each once; see `WeightOrders.pull`."""
        await self.weights.pull(states, sink)

    async def close(self, reason: str) -> None:
        """End the job on every machine that can still be reached."""
        for machine in self.machines:
            try:
                await self._wire.notify(machine.peer, EndShare(self.job, self.epoch, reason))
            except (NetworkError, ProtocolError):
                log.debug("job %s: %s is gone already", self.job, machine.name)
        self._wire.detach(JobEpoch(self.job, self.epoch), self)
        self.watch.close()
