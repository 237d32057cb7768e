"""Resuming a run: what it goes on from, and whether the model and the optimizer can take it."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

from fusionai.errors import CheckpointError, ConfigError, JobError
from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.evaluation import evaluated
from fusionai.graph.model import OpDag
from fusionai.owner.run_folder import JOB_FILE
from fusionai.tensor import TensorData
from fusionai.training.checkpoint import CheckpointReader, latest
from fusionai.training.checkpoint.manifest import MANIFEST
from fusionai.training.config import JobConfig, job_from
from fusionai.training.weight_orders import WeightSource


class CheckpointWeights:
    """Tensors of a checkpoint. A checkpoint holds no constants, so they come from the captured model."""

    def __init__(self, reader: CheckpointReader, captured: WeightSource) -> None:
        self._reader = reader
        self._captured = captured

    def read(self, name: str) -> TensorData:
        """Return a weight by key, or an optimizer state by "<key>::<state>"."""
        return self._reader.read(name) if name in self._reader else self._captured.read(name)


# --- the run ----------------------------------------------------------------------------------------------------------


def newest_checkpoint(run: Path, *, steps: int) -> CheckpointReader:
    """Return the newest complete checkpoint of a run that is to have `steps` steps in all, its contents not verified.

    Raises CheckpointError when there is none, and JobError when it has all its steps done already.
    """
    if (run / MANIFEST).exists():
        raise CheckpointError(_not_a_run(run))
    found = latest(run)
    if found is None:
        raise CheckpointError(
            f"{run} holds no complete checkpoint to resume from; give a run folder, which is the folder that has "
            "`checkpoints` in it, or start a new run"
        )
    reader = CheckpointReader(found)
    done = reader.manifest.step
    if done >= steps:
        raise JobError(
            f"the checkpoint {found} has {done} steps done and training.steps is {steps}: raise training.steps to "
            "train on"
        )
    return reader


def job_of_run(run: Path) -> JobConfig:
    """Return the job of a run, as its job.toml has it.

    Raises ConfigError when there is none, it is damaged, or the run was made through the Python API.
    """
    path = run / JOB_FILE
    if (run / MANIFEST).exists():
        raise ConfigError(_not_a_run(run))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not run.is_dir():
            raise ConfigError(f"the run folder {run} does not exist") from error
        raise ConfigError(
            f"{run} is no run that can be resumed: it has no {JOB_FILE}; give a run folder, or start a new run with "
            "model.path set to a checkpoint"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the job of the run, {path}, cannot be read: {error}") from error
    if "model" not in table:
        raise ConfigError(
            f"the run {run} was made through the Python API, so its model and its data are in a program: go on with it "
            f"there, by fusionai.train(..., resume={str(run)!r})"
        )
    return job_from(table, source=str(path))


def _not_a_run(checkpoint: Path) -> str:
    run = checkpoint.absolute().parent.parent
    return (
        f"{checkpoint} is a checkpoint and no run: give the run folder that it lies in ({run}), "
        "which goes on from its newest checkpoint, or begin a new run with model.path set to the checkpoint"
    )


def has_job_file(run: Path) -> bool:
    """Whether a run was made from a job file, and can be resumed by `fusionai train`."""
    try:
        job_of_run(run)
    except ConfigError:
        return False
    return True


# --- the model and the optimizer --------------------------------------------------------------------------------------


def check_same_model(graph: OpDag, optimizer: OptimizerConfig, reader: CheckpointReader) -> None:
    """Check that a checkpoint holds the weights of a graph and the states of its optimizer, and nothing else.

    Raises CheckpointError naming the first tensor that is missing, of another type, or without a place.
    """
    weights = {weight.key: weight for weight in evaluated(graph).weights if weight.kind != "constant"}
    held, states = dict.fromkeys(reader.weights), dict.fromkeys(reader.states)
    for key, weight in weights.items():
        if key not in held:
            raise CheckpointError(f"{reader.folder} lacks the weight {key!r}: it is of another model")
        spec = reader.spec(key)
        if tuple(spec.shape) != tuple(weight.type.shape):
            raise CheckpointError(
                f"weight {key!r} has shape {list(spec.shape)} in {reader.folder}, but "
                f"{list(weight.type.shape)} in the model"
            )
        if spec.dtype != weight.type.dtype:
            raise CheckpointError(
                f"weight {key!r} is {spec.dtype} in {reader.folder}, but {weight.type.dtype} in the model"
            )
    unplaced = next((key for key in held if key not in weights), None)
    if unplaced is not None:
        raise CheckpointError(
            f"{reader.folder} holds the weight {unplaced!r}, which has no place in the model: it is of another model, "
            "or the loss does not use that weight"
        )
    trainable = (key for key, weight in weights.items() if weight.trainable)
    needed = dict.fromkeys(f"{key}::{state}" for key in trainable for state in optimizer.states)
    lacking = next((name for name in needed if name not in states), None)
    if lacking is not None:
        raise CheckpointError(
            f"{reader.folder} holds no optimizer state {lacking!r}: it was made with another optimizer than "
            f"{optimizer.kind}, or that weight was frozen. {_ANEW}"
        )
    idle = next((name for name in states if name not in needed), None)
    if idle is not None:
        raise CheckpointError(
            f"{reader.folder} holds the optimizer state {idle!r}, for which {optimizer.kind} has no use: it was "
            f"made with another optimizer, or that weight was not frozen. {_ANEW}"
        )


_ANEW = "Resume with what the run began with, or begin a new run with the weights of the checkpoint"


# --- words ------------------------------------------------------------------------------------------------------------


def how_to_resume(run: Path, *, python: bool) -> str:
    """Return the command, or the call, that goes on with a run. The token is left out: it is a secret."""
    if python:
        return f"fusionai.train(..., resume={str(run)!r})"
    return f"fusionai train --broker TOKEN --resume {shlex.quote(str(run))}"


def what_is_left(run: Path, *, python: bool) -> str:
    """Say which checkpoint of a run that ended early is the last, and how to go on from it. Blocks."""
    kept = latest(run)
    if kept is None:
        return "no checkpoint has been made yet"
    return f"the last good checkpoint is {kept}; go on with `{how_to_resume(run, python=python)}`"
