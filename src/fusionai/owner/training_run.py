"""A whole training run on the owner's side: submit the job, drive it, and tell how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from msgspec.structs import replace

from fusionai.errors import FusionError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.encoding import content_hash, encode
from fusionai.graph.evaluation import evaluated
from fusionai.graph.privacy import arrange_private
from fusionai.owner.membership import OwnerMember
from fusionai.owner.plan_terms import PlanTerms
from fusionai.owner.run_folder import JOB_FILE, RunFolder
from fusionai.owner.running_job import RunningJob, tell_end
from fusionai.owner.stop_request import JobStopped, StopRequest
from fusionai.owner.training_job import Observer, TrainingJob, TrainingResult
from fusionai.owner.training_loop import TrainingLoop
from fusionai.pool.identifiers import Epoch, JobEpoch
from fusionai.pool.messages import JobLaunched, SubmitJob
from fusionai.training.driver import Driver
from fusionai.training.loss_weights import LossWeights
from fusionai.training.machine import Machine, sizes_of

SUBMIT_TIMEOUT_S = 300.0
"""Planning of a large model, and every compnode's making of its program."""


async def train(
    job: TrainingJob, member: OwnerMember, folder: RunFolder, stop: StopRequest, observer: Observer | None = None
) -> TrainingResult:
    """Train a job on the pool that `member` has joined, and return how it went.

    Raises JobError when a compnode is lost, the loss is not finite, or the broker's plan is not what was asked for;
    PlacementError when no plan fits; ConfigError when microbatches shall count by labels that the model does not have;
    DataError when nothing counts in a step; JobStopped when `stop` asked for it.
    """
    observer = observer or Observer()
    # Before anything is planned: a choice of shares that the model does not allow is refused at once.
    weights = await asyncio.to_thread(LossWeights, job.graph, job.training.loss_share, member.plane, job.weights)
    heldout_weights = weights
    if job.graph.evaluation is not None:
        heldout_weights = await asyncio.to_thread(
            LossWeights, evaluated(job.graph), job.training.loss_share, member.plane, job.weights
        )
    launched, terms = await _submit(job, member)
    state: Literal["finished", "failed", "cancelled"] = "failed"
    reason = "the owner stopped"
    running: RunningJob | None = None
    try:

        def make_driver(epoch: Epoch, machines: Sequence[Machine]) -> Driver:
            return Driver(
                JobEpoch(launched.job, epoch),
                member.wire,
                terms.graph,
                machines,
                privacy=terms.privacy,
                gradient_clip=job.training.gradient_clip,
                clipping=member.plane.clipping,
            )

        running = RunningJob(terms, member, launched, make_driver)
        # Not before: a job that is refused must leave a run that it would resume as it was.
        folder.write(JOB_FILE, job.description)
        noted = weights.noted_in(running.plan)
        folder.write_plan(noted)
        observer.launched(replace(launched, plan=noted), running.driver.machines)
        resumed = job.optimizer.states if job.first_step else ()
        await running.driver.prepare(job.weights, optimizer_states=resumed, optimizer_step=job.first_step)
        observer.ready()
        result = await TrainingLoop(
            job, terms.graph, running, member, folder, stop, observer, weights, heldout_weights
        ).run()
        state, reason = "finished", ""
        return result
    except (asyncio.CancelledError, JobStopped):
        state, reason = "cancelled", "the owner cancelled it"
        raise
    except FusionError as error:
        reason = str(error)
        raise
    finally:
        ending = tell_end(member, launched.job, state, reason) if running is None else running.close(state, reason)
        await asyncio.shield(ending)


async def _submit(job: TrainingJob, member: OwnerMember) -> tuple[JobLaunched, PlanTerms]:
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
    return launched, PlanTerms(
        graph=graph,
        graph_hash=submit.graph_hash,
        front=front,
        back=back,
        sizes=submit.sizes,
        privacy=submit.privacy,
        options=submit.options,
        compnodes=submit.compnodes,
        machines=submit.machines,
        cuts=submit.cuts,
        steps=job.training.steps,
        microbatches=submit.microbatches,
        # Cuts that the owner chose stay.
        allowed=job.placement.replan and job.placement.cuts is None,
    )
