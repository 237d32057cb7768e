"""Training from a job file: what `fusionai train` and `fusionai demo` do."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from fusionai.errors import ConfigError
from fusionai.execution.own_thread import from_own_thread
from fusionai.owner.interrupts import run_interruptibly
from fusionai.owner.language_model import prepare_language_model
from fusionai.owner.membership import OwnerOptions, joined
from fusionai.owner.resumed_job import check_resumed
from fusionai.owner.resuming import job_of_run, newest_checkpoint
from fusionai.owner.run_folder import open_run
from fusionai.owner.stop_request import StopRequest
from fusionai.owner.training_job import Observer, TrainingResult
from fusionai.owner.training_run import train
from fusionai.training.config import JobConfig, job_from, read_job, to_toml


def job_of(path: Path | None, resume: Path | None, overrides: Sequence[str]) -> JobConfig:
    """Return the job of a job file, or of the run to resume, with overrides such as "training.steps=500".

    Raises ConfigError naming the field.
    """
    if path is not None:
        job = read_job(path)
    elif resume is not None:
        job = job_of_run(resume)
    else:
        raise ConfigError("give a job file, or --resume RUN")
    return _overridden(job, overrides) if overrides else job


def _overridden(job: JobConfig, overrides: Sequence[str]) -> JobConfig:
    table = tomllib.loads(to_toml(job))
    for override in overrides:
        name, equals, text = override.partition("=")
        *parents, field = name.strip().split(".")
        place = table
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else {}
        if not equals or not field or not isinstance(place, dict):
            raise ConfigError(f"--set {override!r} must be TABLE.FIELD=VALUE, such as training.steps=500")
        try:
            place[field] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            place[field] = text
    return job_from(table, source="--set")


def train_job(
    job: JobConfig,
    owner: OwnerOptions,
    *,
    run: Path | None = None,
    resume: Path | None = None,
    observer: Observer | None = None,
    second_interrupt: Callable[[], None] | None = None,
) -> TrainingResult:
    """Train a job on a pool, and return how it went. Blocks.

    Results go to the folder `run`, by default a new one under "runs". A resumed run goes on in its own folder, or in
    `run`, which gets a copy of its packed text. Ctrl-C and SIGTERM end the job in order; `second_interrupt` is called,
    in a signal handler, when a second one comes.

    Raises:
        TrainingInterrupted: the job ended early because of Ctrl-C or SIGTERM.
        UserError: bad input; a run that should be resumed is as it was then.
        PlacementError, NetworkError, StorageError, JobError: no plan fits, or the job could not go on.
    """
    checkpoint = None
    if resume is not None:
        begun = job_of_run(resume)
        checkpoint = newest_checkpoint(resume, steps=job.training.steps)
        check_resumed(begun, job, folder=resume, checkpoint=checkpoint.folder)
    with open_run(run, resume, name=job.name) as folder:
        if resume is not None:
            # Again, now that no other owner can train in it: the one before may have gone on meanwhile.
            checkpoint = newest_checkpoint(resume, steps=job.training.steps)

        async def main(stop: StopRequest) -> TrainingResult:
            # Join first, so that a wrong token is reported before the model takes minutes.
            async with joined(owner) as member:
                prepared = await from_own_thread(lambda: prepare_language_model(job, folder, resume=checkpoint))
                return await train(prepared, member, folder, stop, observer)

        return run_interruptibly(main, folder, python=False, second=second_interrupt)
