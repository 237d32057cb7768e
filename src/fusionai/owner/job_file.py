"""Training from a job file: what `fusionai train` and `fusionai demo` do."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Sequence
from pathlib import Path

from fusionai.errors import ConfigError
from fusionai.execution.own_thread import in_own_thread
from fusionai.network.loop import run as run_loop
from fusionai.owner.language_model import prepare_language_model
from fusionai.owner.membership import OwnerOptions, joined
from fusionai.owner.resuming import newest_checkpoint
from fusionai.owner.run_folder import RunFolder
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
        job = read_job(resume / "job.toml")
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
) -> TrainingResult:
    """Train a job on a pool, and return how it went. Blocks.

    Results go to the folder `run`, by default a new one under "runs". A resumed run goes on in its own folder. Raises
    UserError for bad input, PlacementError when no plan fits, NetworkError, StorageError or JobError.
    """
    if run is not None:
        folder = RunFolder(run)
    elif resume is not None:
        folder = RunFolder(resume)
    else:
        folder = RunFolder.fresh(Path("runs"), job.name)
    return run_loop(_train(job, owner, folder, resume, observer))


async def _train(
    job: JobConfig, owner: OwnerOptions, folder: RunFolder, resume: Path | None, observer: Observer | None
) -> TrainingResult:
    checkpoint = newest_checkpoint(resume) if resume is not None else None
    # Join first, so that a wrong token is reported before the model takes minutes.
    async with joined(owner) as member:
        folder.write("job.toml", to_toml(job))
        prepared = await asyncio.to_thread(
            in_own_thread, lambda: prepare_language_model(job, folder, resume=checkpoint)
        )
        return await train(prepared, member, folder, observer)
