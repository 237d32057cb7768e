"""The steps of one training run, and what comes between them: evaluation, checkpoints, and other plans.

A checkpoint is made after the steps and minutes that the job asks for, at the end, when the owner stops the job, and
when an error ends it while all machines still hold the state of the last committed step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

from fusionai.errors import FusionError, StorageError
from fusionai.graph.model import OpDag
from fusionai.network.clock import now_s
from fusionai.owner.checkpointing import save_checkpoint
from fusionai.owner.membership import OwnerMember
from fusionai.owner.resuming import what_is_left
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.running_job import RunningJob
from fusionai.owner.stop_request import JobStopped, StopRequest
from fusionai.owner.training_job import Observer, StepEvent, TrainingJob, TrainingResult
from fusionai.pool.messages import JobProgress
from fusionai.training.checkpoint import prune
from fusionai.training.data.batches import Batch
from fusionai.training.driver import RoundResult
from fusionai.training.learning_rate import learning_rate
from fusionai.training.loss_weights import LossWeights

log = logging.getLogger(__name__)


class TrainingLoop:
    """The steps of one run, and what comes between them."""

    def __init__(
        self,
        job: TrainingJob,
        graph: OpDag,
        running: RunningJob,
        member: OwnerMember,
        folder: RunFolder,
        stop: StopRequest,
        observer: Observer,
        weights: LossWeights,
        heldout_weights: LossWeights,
    ) -> None:
        """`weights` weigh the microbatches of steps, `heldout_weights` those of evaluations."""
        self._job, self._graph, self._running, self._member = job, graph, running, member
        self._weights, self._heldout_weights = weights, heldout_weights
        self._folder, self._stop, self._observer = folder, stop, observer
        stop.heard = observer.stopping
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._bytes_sent = 0
        self._told_s = 0.0
        self._started_s = 0.0
        self._longest_s = 0.0
        self._done = self._saved_step = job.first_step
        """Steps that are committed, and those that the last checkpoint has."""
        self._saved_s = 0.0
        self._saved: str | None = None
        self._saving = False

    async def run(self) -> TrainingResult:
        """Run all steps; the loss of the first and last, and the final checkpoint, are in the result.

        Raises JobStopped when the owner stops the job. The text of any other FusionError says which checkpoint is left.
        """
        try:
            return await self._run()
        except JobStopped:
            raise
        except Exception as error:
            await self._keep_last_step(error)
            left = await asyncio.to_thread(what_is_left, self._folder.path, python=self._job.python)
            steps = self._job.training.steps
            where = f"step {min(self._done + 1, steps)} of {steps}; {left}"
            if isinstance(error, FusionError):
                raise type(error)(f"{error} ({where})") from error
            error.add_note(where)
            raise

    async def _run(self) -> TrainingResult:
        job, training = self._job, self._job.training
        losses: list[float] = []
        heldout: float | None = None
        self._started_s = time.perf_counter()
        self._saved_s = now_s()
        upcoming = asyncio.ensure_future(self._batch(job.first_step))
        try:
            for step in range(job.first_step, training.steps):
                await self._stop.wait_for(upcoming)
                if self._stop.asked:
                    await self._end_early()
                batch, shares = await upcoming
                last = step + 1 == training.steps
                if not last:
                    upcoming = asyncio.ensure_future(self._batch(step + 1))
                rate = learning_rate(job.schedule, training.learning_rate, step, training.steps)
                result = await self._step(step, batch, shares, rate)
                losses.append(result.loss)
                if last or not self._stop.asked:
                    evaluated = await self._evaluate(step + 1, last=last)
                    heldout = heldout if evaluated is None and last else evaluated
                self._report(step + 1, result, rate, heldout)
                if last or self._checkpoint_is_due():
                    await self._save()
                if not last and not self._stop.asked:
                    await self._replan(step + 1)
        finally:
            if not upcoming.cancel() and not upcoming.cancelled():
                upcoming.exception()  # nobody needs the batch of a step that does not come
        seconds = time.perf_counter() - self._started_s
        assert self._saved is not None
        return TrainingResult(
            first_loss=losses[0],
            final_loss=losses[-1],
            heldout_loss=heldout,
            steps=len(losses),
            tokens_per_s=job.tokens_per_step * len(losses) / seconds,
            compnodes=tuple(each.name for each in self._running.driver.machines),
            bytes_sent=self._bytes_sent,
            checkpoint=self._saved,
            run=str(self._folder.path),
            job=self._running.job,
            lab=self._running.lab,
            replans=self._running.taken,
        )

    async def _batch(self, step: int) -> tuple[list[Batch], Sequence[float]]:
        """Make the microbatches of a step and their shares, off the event loop, while the step before computes."""

        def make() -> tuple[list[Batch], Sequence[float]]:
            batch = [self._job.batches.microbatch(step, index) for index in range(self._job.training.microbatches)]
            return batch, self._weights.weigh(batch, f"step {step + 1}")

        return await asyncio.to_thread(make)

    async def _step(self, step: int, batch: list[Batch], shares: Sequence[float], rate: float) -> RoundResult:
        result = await self._running.driver.train_step(step, batch, shares, rate)
        self._done = step + 1
        self._longest_s = max(self._longest_s, result.seconds)
        self._stop.step_done(self._longest_s)
        self._bytes_sent += _bytes(result)
        self._running.observe(step, result)
        return result

    async def _replan(self, done: int) -> None:
        """Go over to a new plan, where one stands."""
        event = await self._running.between_steps(done)
        if event is None:
            return
        if event.error is None:
            await asyncio.to_thread(self._folder.write_plan, self._weights.noted_in(event.plan))
        self._folder.append_metrics(event.record())
        self._observer.replanned(event)

    async def _evaluate(self, done: int, *, last: bool) -> float | None:
        every = self._job.training.evaluate_every
        if not last and not (every and done % every == 0):
            return None

        def make() -> tuple[list[Batch], Sequence[float]]:
            batches = list(self._job.batches.heldout())[: self._job.training.evaluation_batches]
            return batches, self._heldout_weights.weigh(batches, "the held-out batch") if batches else ()

        batches, shares = await asyncio.to_thread(make)
        if not batches:
            return None
        result = await self._running.driver.evaluate(batches, shares)
        self._bytes_sent += _bytes(result)
        return result.loss

    def _report(self, done: int, result: RoundResult, rate: float, heldout: float | None) -> None:
        job = self._job
        self._recent.append((result.seconds, job.tokens_per_step))
        tokens_per_s = sum(tokens for _, tokens in self._recent) / sum(seconds for seconds, _ in self._recent)
        names = self._running.names
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
            "lab": self._running.lab,
        }
        self._folder.append_metrics(record)
        self._observer.stepped(StepEvent(done, job.training.steps, result.loss, tokens_per_s, result, rate, heldout))
        now_s = time.monotonic()
        if now_s - self._told_s >= 1.0 or done == job.training.steps:
            self._told_s = now_s
            self._member.tell(JobProgress(self._running.job, done, job.training.steps, result.loss, tokens_per_s))

    # --- checkpoints and endings ----------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        """Whether the steps or the minutes are over after which the job asks for a checkpoint."""
        training = self._job.training
        if training.checkpoint_every and self._done % training.checkpoint_every == 0:
            return True
        return bool(training.checkpoint_minutes) and now_s() - self._saved_s >= 60 * training.checkpoint_minutes

    async def _save(self, *, keep_all: bool = False) -> None:
        """Make a checkpoint of the committed steps, and remove old ones unless `keep_all`."""
        path = self._folder.checkpoint(self._done)
        self._saving = True
        with self._stop.saving():
            await save_checkpoint(
                path,
                self._graph,
                self._running.driver,
                self._job.files,
                job=self._job.name,
                optimizer=self._job.optimizer,
                step=self._done,
                seed=self._job.training.seed,
            )
            if not keep_all:
                await asyncio.to_thread(prune, self._folder.path, self._job.training.keep_checkpoints)
        self._saving = False
        # Counted from its end, so that a checkpoint that takes minutes does not follow upon the one before.
        self._saved_s = now_s()
        self._saved, self._saved_step = str(path), self._done
        self._observer.saved(self._saved)

    async def _end_early(self) -> None:
        """Raise JobStopped, after a checkpoint of the committed steps."""
        if self._saved_step != self._done:
            await self._save()
        left = await asyncio.to_thread(what_is_left, self._folder.path, python=self._job.python)
        raise JobStopped(f"interrupted after step {self._done} of {self._job.training.steps}; {left}")

    async def _keep_last_step(self, error: Exception) -> None:
        """Make a checkpoint after an error, where all machines still hold the state of the last committed step.

        They do when the loss is not finite, and when data or an observer fail. No older checkpoint is removed for it:
        a state that led to an error may be a bad one. Nothing is tried when the disk or a checkpoint failed.
        """
        fresh = self._done != self._saved_step
        if not fresh or self._saving or isinstance(error, StorageError) or not self._running.driver.at_rest:
            return
        try:
            await self._save(keep_all=True)
        except FusionError as trouble:
            log.warning("no checkpoint could be made of the last committed step: %s", trouble)


def _bytes(result: RoundResult) -> int:
    """Return the tensor bytes that went between machines in a round: between stages, and inputs to stages elsewhere."""
    between = sum(sum(report.bytes_sent.values()) for report in result.reports.values())
    return between + sum(result.fed_bytes.values())
