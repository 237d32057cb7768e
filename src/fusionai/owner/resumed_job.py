"""Which fields of a job may change when its run goes on, and why the others may not.

A resumed run takes the weights, the optimizer's state and the tokenizer of a checkpoint, and the text that its run
packed when it began. So a field that only says what those are made of would change nothing, and one that decides what
the optimizer's state means would make it wrong. Such fields are refused. Every other field is honoured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fusionai.errors import ConfigError
from fusionai.training.config import JobConfig

HONOURED = ""
"""The resumed run goes by the new value."""

_WEIGHTS = "the model and its weights come from the checkpoint"
_TEXT = "the run goes on with the text that it packed when it began"
_STATE = "the checkpoint holds the state of the optimizer that the run began with"

RULES: Mapping[str, str] = {
    "name": HONOURED,
    "model.path": _WEIGHTS,
    "model.config": _WEIGHTS,
    "model.task": _WEIGHTS,
    "data.text": _TEXT,
    "data.field": _TEXT,
    "data.tokenizer": "the tokenizer comes from the checkpoint, and the text is packed with it",
    "data.vocabulary_size": "the tokenizer comes from the checkpoint",
    "data.sequence_length": "the text would be cut into other sequences, and held-out text would be trained on",
    "data.heldout_fraction": "other sequences would be held out, among them some that were trained on",
    "training.steps": HONOURED,
    "training.batch_size": "the order of the text goes by the sequences of a step",
    "training.microbatches": "the order of the text goes by the sequences of a step",
    "training.learning_rate": HONOURED,
    "training.gradient_clip": HONOURED,
    "training.loss_share": HONOURED,
    "training.precision": HONOURED,
    "training.compile": HONOURED,
    "training.seed": "it decides the order of the text, so some sequences would come twice and others not at all",
    "training.evaluate_every": HONOURED,
    "training.evaluation_batches": HONOURED,
    "training.checkpoint_every": HONOURED,
    "training.checkpoint_minutes": HONOURED,
    "training.keep_checkpoints": HONOURED,
    "optimizer.kind": _STATE,
    "optimizer.beta1": HONOURED,
    "optimizer.beta2": HONOURED,
    "optimizer.epsilon": HONOURED,
    "optimizer.weight_decay": HONOURED,
    "optimizer.momentum": _STATE,
    "schedule.kind": HONOURED,
    "schedule.warmup_steps": HONOURED,
    "schedule.minimum_ratio": HONOURED,
    "placement.privacy": HONOURED,
    "placement.compnodes": HONOURED,
    "placement.cuts": HONOURED,
    "placement.replan": HONOURED,
    "placement.machines": HONOURED,
}
"""Why a resumed run cannot take another value of a field, or `HONOURED`. A test requires a rule for every field."""

_PATHS = frozenset({"model.path", "data.text", "data.tokenizer"})
"""Fields that may name one file in several ways."""

_PRODUCT = ("training.batch_size", "training.microbatches")


def fields_of(job: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of a job file with its value, such as ("training.steps", 100)."""
    for field in msgspec.structs.fields(job):
        value = getattr(job, field.name)
        if isinstance(value, msgspec.Struct):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def check_resumed(run: JobConfig, asked: JobConfig, *, folder: Path, checkpoint: Path) -> None:
    """Check that a run can go on as the job `asked`.

    Args:
        run: the job of the run.
        asked: the job as it is to go on.
        folder: the run's folder, for the error.
        checkpoint: the checkpoint that it goes on from, for the error.

    Raises:
        ConfigError: fields differ that cannot change. The error names each with both values, the reason and a remedy.
    """
    refused = [
        _refusal(field, run, asked)
        for field, _ in fields_of(asked)
        if RULES[field] != HONOURED and not _same(field, run, asked)
    ]
    if refused:
        raise ConfigError(
            f"the run {folder} cannot go on with other values of these fields: {'; '.join(dict.fromkeys(refused))}. "
            "Leave them as they were, or begin a new run with the weights of this one and a new optimizer state: "
            f"model.path = {str(checkpoint)!r}"
        )


def _same(field: str, run: JobConfig, asked: JobConfig) -> bool:
    """Whether a field that must not change means the same in both jobs."""
    if field in _PRODUCT:
        return _sequences(run) == _sequences(asked)
    if field == "optimizer.momentum":
        # Another momentum goes on with the same buffers. None at all has no buffers.
        return run.optimizer.kind != asked.optimizer.kind or run.optimizer.states == asked.optimizer.states
    before, after = dict(fields_of(run))[field], dict(fields_of(asked))[field]
    return before == after or (field in _PATHS and _one_file(before, after))


def _sequences(job: JobConfig) -> int:
    return job.training.batch_size * job.training.microbatches


def _one_file(before: str | None, after: str | None) -> bool:
    if before is None or after is None:
        return False
    one, other = Path(before).expanduser(), Path(after).expanduser()
    return one.exists() and other.exists() and one.resolve() == other.resolve()


def _refusal(field: str, run: JobConfig, asked: JobConfig) -> str:
    """Return a field with both values and the reason why it cannot change."""
    because = RULES[field]
    if field in _PRODUCT:
        sizes = [f"{each.training.batch_size} x {each.training.microbatches}" for each in (run, asked)]
        return f"{' x '.join(_PRODUCT)} is {sizes[0]} in the run and {sizes[1]} here ({because}: keep the product)"
    before, after = dict(fields_of(run))[field], dict(fields_of(asked))[field]
    if isinstance(before, dict) and isinstance(after, dict):
        key = next(key for key in (*after, *before) if before.get(key) != after.get(key))
        field, before, after = f"{field}.{key}", before.get(key), after.get(key)
    return f"{field} is {_shown(before)} in the run and {_shown(after)} here ({because})"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "given"
    return "left out" if value is None else repr(value)
