"""A whole training run on the owner's side: submit, drive, evaluate, checkpoint."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from fusionai.errors import FusionError, JobError, NetworkError
from fusionai.execution.plane import OptimizerConfig, ProgramOptions
from fusionai.graph.encoding import content_hash, encode
from fusionai.graph.model import OpDag
from fusionai.graph.privacy import arrange_private
from fusionai.owner.checkpointing import CheckpointFiles, save_checkpoint
from fusionai.owner.machines import machines_of
from fusionai.owner.membership import OwnerMember
from fusionai.owner.replanning import ReplanEvent, Replanning, ReplanTerms
from fusionai.owner.run_folder import RunFolder
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobEpoch, JobId
from fusionai.pool.messages import JobEnded, JobLaunched, JobProgress, SubmitJob
from fusionai.scheduling.plan import Plan
from fusionai.training.checkpoint import latest, prune
from fusionai.training.config import PlacementConfig, TrainingConfig
from fusionai.training.data.batches import Batch, Batches
from fusionai.training.driver import Driver, Machine, RoundResult, WeightSource, sizes_of
from fusionai.training.learning_rate import ScheduleConfig, learning_rate
from fusionai.training.loss_weights import loss_weights

log = logging.getLogger(__name__)

SUBMIT_TIMEOUT_S = 300.0
"""Planning of a large model, and every compnode's making of its program."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What is to be trained, captured and ready to submit."""

    name: str
    graph: OpDag
    weights: WeightSource
    """Weights that training starts from; when resuming, optimizer states as "<key>::<state>" too."""
    batches: Batches
    files: CheckpointFiles
    tokens_per_step: int
    """What throughput counts: tokens of a step, or samples where there are no tokens."""
    description: str
    """The job file as run, for the record."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    first_step: int = 0
    """Steps already done by the run that this one resumes."""


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What an observer hears after each step."""

    step: int
    """Steps done so far."""
    steps: int
    loss: float
    tokens_per_s: float
    """Over the last steps."""
    result: RoundResult
    learning_rate: float
    evaluation: float | None
    """Held-out loss, where this step was followed by an evaluation."""


class TrainingResult(msgspec.Struct, frozen=True):
    """How a run ended; the JSON of `fusionai train --json`."""

    first_loss: float
    final_loss: float
    heldout_loss: float | None
    steps: int
    tokens_per_s: float
    compnodes: tuple[str, ...]
    bytes_sent: int
    """Tensor bytes between machines, both directions, weights and checkpoints not counted."""
    checkpoint: str
    run: str
    job: str
    lab: bool
    """Whether speeds or links were emulated."""
    replans: int = 0
    """How often the job went over to a new plan while it ran."""


class Observer:
    """Hears how a run goes; override what is of interest. Called on the event loop: return quickly."""

    def launched(self, launched: JobLaunched, machines: Sequence[Machine]) -> None:
        """The plan is made and every machine has its share."""

    def ready(self) -> None:
        """Every machine has its weights."""

    def stepped(self, event: StepEvent) -> None:
        """A step is committed."""

    def replanned(self, event: ReplanEvent) -> None:
        """The job went over to a new plan, or one could not be taken."""

    def saved(self, path: str) -> None:
        """A checkpoint is on disk."""


async def train(
    job: TrainingJob, member: OwnerMember, folder: RunFolder, observer: Observer | None = None
) -> TrainingResult:
    """Train a job on the pool that `member` has joined, and return how it went.

    Raises JobError when a compnode is lost or the loss is not finite, PlacementError when no plan fits.
    """
    observer = observer or Observer()
    launched, terms = await _submit(job, member)
    state, reason = "failed", "the owner stopped"
    replanning: Replanning | None = None
    try:
        graph = terms.graph
        machines = machines_of(graph, launched.plan, {member.identity.peer_id: member.name, **launched.names})
        _write_plan(folder, launched.plan)

        def make_driver(epoch: Epoch, machines: Sequence[Machine]) -> Driver:
            return Driver(
                JobEpoch(launched.job, epoch),
                member.wire,
                graph,
                machines,
                gradient_clip=job.training.gradient_clip,
                clipping=member.plane.clipping,
            )

        driver = make_driver(FIRST_EPOCH, machines)
        replanning = Replanning(terms, member, launched, driver, make_driver)
        member.on_job_lost(launched.job, replanning.fail)
        member.on_pool_changed(launched.job, replanning.reconsider)
        observer.launched(launched, machines)
        resumed = job.optimizer.states if job.first_step else ()
        await driver.prepare(job.weights, optimizer_states=resumed, optimizer_step=job.first_step)
        observer.ready()
        result = await _Loop(job, graph, replanning, member, folder, observer, launched.job).run()
        state, reason = "finished", ""
        return result
    except asyncio.CancelledError:
        state, reason = "cancelled", "the owner cancelled it"
        raise
    except FusionError as error:
        reason = str(error)
        raise
    finally:
        await asyncio.shield(_wind_up(replanning, member, launched, state, reason))


async def _submit(job: TrainingJob, member: OwnerMember) -> tuple[JobLaunched, ReplanTerms]:
    graph, front, back = job.graph, 0, len(job.graph.nodes)
    if job.placement.privacy == "private":
        graph, front, back = await asyncio.to_thread(arrange_private, job.graph)
    encoded = await asyncio.to_thread(encode, graph)
    submit = SubmitJob(
        job_name=job.name,
        config=job.description,
        graph_hash=await asyncio.to_thread(content_hash, graph),
        front=front,
        back=back,
        sizes=sizes_of(graph, await asyncio.to_thread(job.batches.microbatch, job.first_step, 0)),
        microbatches=job.training.microbatches,
        privacy=job.placement.privacy,
        options=ProgramOptions(
            device=member.device,
            precision=job.training.precision,
            compile=job.training.compile,
            optimizer=job.optimizer,
            seed=job.training.seed,
        ),
        compnodes=job.placement.compnodes,
        cuts=job.placement.cuts,
        machines=job.placement.machines,
    )
    await member.send_graph(submit.graph_hash, encoded)
    launched = await member.request(submit, JobLaunched, timeout_s=SUBMIT_TIMEOUT_S)
    return launched, ReplanTerms(
        graph=graph,
        front=front,
        back=back,
        options=submit.options,
        compnodes=submit.compnodes,
        machines=submit.machines,
        steps=job.training.steps,
        microbatches=submit.microbatches,
        # Cuts that the owner chose stay.
        allowed=job.placement.replan and job.placement.cuts is None,
    )


def _write_plan(folder: RunFolder, plan: Plan) -> None:
    folder.write("plan.json", msgspec.json.format(msgspec.json.encode(plan)).decode())


async def _wind_up(
    replanning: Replanning | None, member: OwnerMember, launched: JobLaunched, state: str, reason: str
) -> None:
    member.on_pool_changed(launched.job, None)
    if replanning is not None:
        await replanning.close()
        await replanning.driver.close(reason or state)
    ended = msgspec.convert({"job": launched.job, "state": state, "reason": reason}, JobEnded)
    try:
        await member.request(ended, None, timeout_s=10.0)
    except NetworkError as error:
        log.warning("the broker could not be told that the job ended: %s", error)


class _Loop:
    """The steps of one run, and what comes between them."""

    def __init__(
        self,
        job: TrainingJob,
        graph: OpDag,
        replanning: Replanning,
        member: OwnerMember,
        folder: RunFolder,
        observer: Observer,
        job_id: JobId,
    ) -> None:
        self._job, self._graph, self._replanning, self._member = job, graph, replanning, member
        self._folder, self._observer, self._job_id = folder, observer, job_id
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._bytes_sent = 0
        self._told_s = 0.0
        self._started_s = 0.0
        self._saved: str | None = None

    async def run(self) -> TrainingResult:
        """Run all steps; the loss of the first and last, and the final checkpoint, are in the result."""
        job, training = self._job, self._job.training
        if job.first_step >= training.steps:
            raise JobError(
                f"the checkpoint has {job.first_step} steps done and training.steps is {training.steps}: "
                "raise training.steps to train on"
            )
        losses: list[float] = []
        heldout: float | None = None
        self._started_s = time.perf_counter()
        upcoming = asyncio.ensure_future(self._batch(job.first_step))
        try:
            for step in range(job.first_step, training.steps):
                batch = await upcoming
                last = step + 1 == training.steps
                if not last:
                    upcoming = asyncio.ensure_future(self._batch(step + 1))
                rate = learning_rate(job.schedule, training.learning_rate, step, training.steps)
                result = await self._step(step, batch, rate)
                losses.append(result.loss)
                heldout = await self._evaluate(step + 1, last=last) or (heldout if last else None)
                self._report(step + 1, result, rate, heldout)
                if last or (training.checkpoint_every and (step + 1) % training.checkpoint_every == 0):
                    await self._save(step + 1)
                if not last:
                    await self._replan(step + 1)
        finally:
            upcoming.cancel()
        seconds = time.perf_counter() - self._started_s
        assert self._saved is not None
        return TrainingResult(
            first_loss=losses[0],
            final_loss=losses[-1],
            heldout_loss=heldout,
            steps=len(losses),
            tokens_per_s=job.tokens_per_step * len(losses) / seconds,
            compnodes=tuple(each.name for each in self._replanning.driver.machines),
            bytes_sent=self._bytes_sent,
            checkpoint=self._saved,
            run=str(self._folder.path),
            job=self._job_id,
            lab=self._replanning.lab,
            replans=self._replanning.taken,
        )

    async def _batch(self, step: int) -> list[Batch]:
        """Make the microbatches of a step, off the event loop, while the step before computes."""
        count = self._job.training.microbatches
        return await asyncio.to_thread(lambda: [self._job.batches.microbatch(step, index) for index in range(count)])

    async def _step(self, step: int, batch: list[Batch], rate: float) -> RoundResult:
        try:
            result = await self._replanning.driver.train_step(step, batch, loss_weights(self._graph, batch), rate)
        except JobError as error:
            kept = await asyncio.to_thread(latest, self._folder.path)
            where = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been made yet"
            raise JobError(f"{error} (step {step + 1} of {self._job.training.steps}; {where})") from error
        self._bytes_sent += _bytes(result)
        self._replanning.observe(step, result)
        return result

    async def _replan(self, done: int) -> None:
        """Go over to a new plan, where one stands."""
        event = await self._replanning.between_steps(done)
        if event is None:
            return
        if event.error is None:
            await asyncio.to_thread(_write_plan, self._folder, event.plan)
        self._folder.append_metrics(event.record())
        self._observer.replanned(event)

    async def _evaluate(self, done: int, *, last: bool) -> float | None:
        every = self._job.training.evaluate_every
        if not last and not (every and done % every == 0):
            return None
        batches = await asyncio.to_thread(self._job.batches.heldout)
        batches = list(batches)[: self._job.training.evaluation_batches]
        if not batches:
            return None
        result = await self._replanning.driver.evaluate(batches, loss_weights(self._graph, batches))
        self._bytes_sent += _bytes(result)
        return result.loss

    def _report(self, done: int, result: RoundResult, rate: float, heldout: float | None) -> None:
        job = self._job
        self._recent.append((result.seconds, job.tokens_per_step))
        tokens_per_s = sum(tokens for _, tokens in self._recent) / sum(seconds for seconds, _ in self._recent)
        names = self._replanning.names
        record = {
            "step": done,
            "loss": result.loss,
            "heldout_loss": heldout,
            "gradient_norm": result.gradient_norm,
            "learning_rate": rate,
            "seconds": result.seconds,
            "elapsed_s": time.perf_counter() - self._started_s,
            "tokens_per_s": job.tokens_per_step / result.seconds,
            "bytes_sent": _bytes(result),
            "compnodes": {
                names.get(peer, peer): {
                    "busy": report.busy_s / result.seconds,
                    "memory_bytes": report.memory_bytes,
                    "bytes_sent": {names.get(to, to): size for to, size in report.bytes_sent.items()},
                }
                for peer, report in result.reports.items()
            },
            "lab": self._replanning.lab,
        }
        self._folder.append_metrics(record)
        self._observer.stepped(StepEvent(done, job.training.steps, result.loss, tokens_per_s, result, rate, heldout))
        now_s = time.monotonic()
        if now_s - self._told_s >= 1.0 or done == job.training.steps:
            self._told_s = now_s
            self._member.tell(JobProgress(self._job_id, done, job.training.steps, result.loss, tokens_per_s))

    async def _save(self, done: int) -> None:
        path = self._folder.checkpoint(done)
        await save_checkpoint(
            path,
            self._graph,
            self._replanning.driver,
            self._job.files,
            job=self._job.name,
            optimizer=self._job.optimizer,
            step=done,
            seed=self._job.training.seed,
        )
        await asyncio.to_thread(prune, self._folder.path, self._job.training.keep_checkpoints)
        self._saved = str(path)
        self._observer.saved(self._saved)


def _bytes(result: RoundResult) -> int:
    """Return the tensor bytes that went between machines in a round: between stages, and inputs to stages elsewhere."""
    between = sum(sum(report.bytes_sent.values()) for report in result.reports.values())
    return between + sum(result.fed_bytes.values())
