"""The steps of one training run, and what comes between them: evaluation, checkpoints, and other plans."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from fusionai.errors import JobError
from fusionai.graph.evaluation import evaluated
from fusionai.graph.model import OpDag
from fusionai.owner.checkpointing import save_checkpoint
from fusionai.owner.membership import OwnerMember
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.running_job import RunningJob
from fusionai.owner.training_job import Observer, StepEvent, TrainingJob, TrainingResult
from fusionai.pool.messages import JobProgress
from fusionai.training.checkpoint import latest, prune
from fusionai.training.data.batches import Batch
from fusionai.training.driver import RoundResult
from fusionai.training.learning_rate import learning_rate
from fusionai.training.loss_weights import loss_weights


class TrainingLoop:
    """The steps of one run, and what comes between them."""

    def __init__(
        self,
        job: TrainingJob,
        graph: OpDag,
        running: RunningJob,
        member: OwnerMember,
        folder: RunFolder,
        observer: Observer,
    ) -> None:
        self._job, self._graph, self._running, self._member = job, graph, running, member
        self._folder, self._observer = folder, observer
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
            compnodes=tuple(each.name for each in self._running.driver.machines),
            bytes_sent=self._bytes_sent,
            checkpoint=self._saved,
            run=str(self._folder.path),
            job=self._running.job,
            lab=self._running.lab,
            replans=self._running.taken,
        )

    async def _batch(self, step: int) -> list[Batch]:
        """Make the microbatches of a step, off the event loop, while the step before computes."""
        count = self._job.training.microbatches
        return await asyncio.to_thread(lambda: [self._job.batches.microbatch(step, index) for index in range(count)])

    async def _step(self, step: int, batch: list[Batch], rate: float) -> RoundResult:
        try:
            result = await self._running.driver.train_step(step, batch, loss_weights(self._graph, batch), rate)
        except JobError as error:
            kept = await asyncio.to_thread(latest, self._folder.path)
            where = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been made yet"
            raise JobError(f"{error} (step {step + 1} of {self._job.training.steps}; {where})") from error
        self._bytes_sent += _bytes(result)
        self._running.observe(step, result)
        return result

    async def _replan(self, done: int) -> None:
        """Go over to a new plan, where one stands."""
        event = await self._running.between_steps(done)
        if event is None:
            return
        if event.error is None:
            await asyncio.to_thread(self._folder.write_plan, event.plan)
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
        shares = loss_weights(evaluated(self._graph), batches)
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

    async def _save(self, done: int) -> None:
        path = self._folder.checkpoint(done)
        await save_checkpoint(
            path,
            self._graph,
            self._running.driver,
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
