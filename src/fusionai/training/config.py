"""The job file: everything that an owner decides about a training job, as data that validates itself.

A job file is TOML, and every class here is one of its tables. Nothing is read from the environment.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec
import tomli_w

from fusionai.errors import ConfigError
from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.loss_shares import LossShare
from fusionai.training.learning_rate import ScheduleConfig

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    # What some kinds of model call them: GPT-2, OPT, T5, XLM, DistilBERT.
    *("n_embd", "n_inner", "n_positions", "n_ctx", "n_layer", "n_layers", "n_head", "n_heads"),
    *("d_model", "d_kv", "d_ff", "ffn_dim", "dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads"),
)
"""Integer fields of transformers configurations that are at least 1 wherever they exist."""


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{field} must be at least {least}, got {value}")


def _check_sizes(config: dict[str, Any]) -> None:
    """Refuse sizes below 1 by name. transformers accepts most of them, and fails later or not at all."""
    for name in _SIZES:
        value = config.get(name)
        # Other types are for transformers to refuse: a field may be a list of each layer's.
        if type(value) is int and value < 1:
            raise ConfigError(
                f"model.config.{name} must be at least 1, got {value}; correct it, or leave it out for "
                f"{_default_of(name, config)}"
            )


def _default_of(name: str, config: dict[str, Any]) -> str:
    return "the tokenizer's" if name == "vocab_size" else f"the default of {config['model_type']!r} configurations"


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to train. Exactly one of `path` and `config`."""

    path: str | None = None
    """A folder with a transformers model, or its name on the Hugging Face hub."""
    config: dict[str, Any] | None = None
    """A transformers configuration to initialise from scratch, `model_type` included."""
    task: Literal["causal", "masked"] = "causal"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError("model: give either model.path or model.config, and not both")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ConfigError('model.config.model_type is missing; for example model_type = "llama"')
        if self.config is not None:
            _check_sizes(self.config)


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text to train on; it is read on the owner's machine."""

    text: str = "stdlib"
    """A text file, a folder, a .jsonl file, or "stdlib": the source of Python's standard library."""
    field: str = "text"
    """Field that holds the text, in a .jsonl file."""
    tokenizer: str | None = None
    """A folder or hub name; without it the model's own tokenizer, or one trained on the text."""
    vocabulary_size: int = 4096
    """Size of the vocabulary of a tokenizer that is trained on the text."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    heldout_fraction: float = 0.02
    """Share of the sequences that is never trained on, for evaluation."""

    def __post_init__(self) -> None:
        if not self.text:
            # An empty path would be the current folder.
            raise ConfigError('data.text is empty; give a text file, a folder, a .jsonl file, or "stdlib"')
        _at_least("data.vocabulary_size", self.vocabulary_size, 258)
        _at_least("data.sequence_length", self.sequence_length, 2)
        if not 0 <= self.heldout_fraction < 0.5:
            raise ConfigError(f"data.heldout_fraction must be in [0, 0.5), got {self.heldout_fraction}")


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Length of the training, batches, precision, and when to evaluate and to write checkpoints."""

    steps: int = 100
    """Steps of the whole run. A resumed run does the steps that are left."""
    batch_size: int = 4
    """Sequences in a microbatch."""
    microbatches: int = 4
    """Microbatches in a step: the step's batch is batch_size x microbatches sequences."""
    learning_rate: float = 1e-3
    """The full rate. The schedule gives the share of it that a step uses."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradients; 0 switches clipping off."""
    loss_share: LossShare = "auto"
    """What a microbatch counts for in a step: as the loss says, by its labels that count, or as much as any other."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: operators run under autocast; weights, gradients and optimizer state stay in fp32."""
    compile: bool = False
    """Whether the plane compiles each stage (`torch.compile`). A stage that cannot be compiled runs without."""
    seed: int = 0
    """Seed of the initial weights, the order of the text, masking and dropout."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out text; 0: only at the end."""
    evaluation_batches: int = 4
    """Most held-out microbatches in an evaluation; 0: no evaluation."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: none by steps."""
    checkpoint_minutes: float = 10.0
    """Minutes of training after which a checkpoint is due, so that no more is lost; 0: none by time."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept. Older ones of the run are removed."""

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "microbatches", "keep_checkpoints"):
            _at_least(f"training.{field}", getattr(self, field), 1)
        for field in ("evaluate_every", "checkpoint_every", "evaluation_batches", "seed"):
            _at_least(f"training.{field}", getattr(self, field), 0)
        if self.seed >= 1 << 63:
            raise ConfigError(f"training.seed must be below 2^63, got {self.seed}")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"training.learning_rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.checkpoint_minutes < float("inf"):
            raise ConfigError(f"training.checkpoint_minutes must be >= 0, got {self.checkpoint_minutes}")
        if not 0 <= self.gradient_clip < float("inf"):
            raise ConfigError(f"training.gradient_clip must be >= 0, got {self.gradient_clip}")


class PlacementConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which machines run which operators."""

    privacy: Literal["private", "open"] = "private"
    """`private`: every operator that touches raw inputs or labels stays on the owner's machine, so these are not sent.
    A compnode can reconstruct them all the same (docs/guarantees.md)."""
    compnodes: int = 0
    """How many compnodes to use; 0: as many as serve the job best."""
    cuts: tuple[int, ...] | None = None
    """Cut positions in the OP-DAG that replace the planner's choice; for experiments."""
    replan: bool = True
    """Whether a running job may go over to a better plan when a machine becomes slower or faster than planned."""
    machines: tuple[str, ...] = ()
    """Names of the only compnodes to use. With `cuts`, they take the shares in this order. Empty: any compnodes."""

    def __post_init__(self) -> None:
        _at_least("placement.compnodes", self.compnodes, 0)
        if self.cuts is not None and list(self.cuts) != sorted(set(self.cuts)):
            raise ConfigError(f"placement.cuts must rise strictly, got {list(self.cuts)}")
        if len(set(self.machines)) != len(self.machines):
            raise ConfigError(f"placement.machines must name each compnode once, got {list(self.machines)}")
        if self.machines and self.cuts is not None and len(self.machines) != len(self.cuts) + 1:
            raise ConfigError(
                f"placement.cuts makes {len(self.cuts) + 1} shares, but placement.machines names {len(self.machines)} "
                "compnodes; name one for each share, or leave placement.machines out"
            )


class JobConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole job file."""

    name: str
    model: ModelConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    placement: PlacementConfig = PlacementConfig()

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= 80 or not all(c.isalnum() or c in "-_. " for c in self.name):
            raise ConfigError(f"name must be 1-80 letters, digits, spaces or any of -_. and is {self.name!r}")


def parse_job(text: str, *, source: str = "the job file") -> JobConfig:
    """Parse a job file. Raises ConfigError naming the field, or the line of a syntax error."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from error
    return job_from(table, source=source)


def job_from(table: dict[str, Any], *, source: str) -> JobConfig:
    """Return the job that the tables of a job file describe. Raises ConfigError naming `source` and the field."""
    try:
        return msgspec.convert(table, JobConfig)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explained(str(error))}") from error


def _explained(text: str) -> str:
    """Return msgspec's message with the field's plain name and the values that are allowed there."""
    path = match[1] if (match := re.search(r"`\$\.?([^`]*)`$", text)) else ""
    kind: Any = JobConfig
    for part in filter(None, path.split(".")):
        is_table = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        kind = get_type_hints(kind).get(part) if is_table else None
    hint = ""
    if "enum value" in text:
        hint = f"; it must be one of {', '.join(get_args(kind))}"
    elif "unknown field" in text and kind is not None:
        hint = f"; the fields there are {', '.join(get_type_hints(kind))}"
    return text.replace("`$.", "`").replace("`$`", "the top level") + hint


def read_job(path: Path) -> JobConfig:
    """Read a job file from disk."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"the job file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the job file {path} cannot be read: {error}") from error
    return parse_job(text, source=str(path))


def to_toml(job: JobConfig) -> str:
    """Return the job file of a job, every default written out."""
    return tables_to_toml(**{each: getattr(job, each) for each in job.__struct_fields__})


def tables_to_toml(**fields: msgspec.Struct | str) -> str:
    """Return fields and tables of a job file as TOML, every default written out."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(fields)))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a field without a value is left out."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
