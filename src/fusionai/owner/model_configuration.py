"""Makes a transformers configuration, and a model without weights, from the model table of a job file."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.activations import ACT2FN

from fusionai.errors import ConfigError, FusionError
from fusionai.graph.capture import Captured, capture_transformers
from fusionai.training.config import DataConfig, JobConfig, ModelConfig

log = logging.getLogger(__name__)

MODEL_CLASSES: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
}

ALL_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt")
"""Files of a model on the hub that are fetched to train it: no code, and no pickled weights."""

CONFIGURATION_FILES = ("config.json",)
"""Files of a model on the hub that are fetched to plan for it."""

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""Fields that name an activation, in all kinds of configuration."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The values that a configuration takes from a tokenizer."""

    size: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Return the vocabulary of a tokenizer."""
    ids = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return Vocabulary(len(tokenizer), *ids)


def model_folder(model: ModelConfig, files: Sequence[str]) -> Path | None:
    """Return the folder of a pretrained model, fetching `files` from the hub when `path` is a name there.

    None for a model from [model.config]. Raises ConfigError when there is no such model, here or there.
    """
    if model.path is None:
        return None
    local = Path(model.path).expanduser()
    if local.is_dir():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model.path, allow_patterns=list(files)))
    except Exception as error:
        # The hub's client raises errors of several libraries. All of them mean that the model cannot be fetched.
        raise ConfigError(
            f"model.path {model.path!r} is no folder here and cannot be fetched from the hub ({first_line(error)}); "
            "check the name and the connection, or give a folder"
        ) from error


def configuration(model: ModelConfig, data: DataConfig, vocabulary: Vocabulary | None, source: Path | None) -> Any:
    """Return the transformers configuration, checked against the vocabulary and the sequence length.

    Args:
        model: the table of the job file.
        data: the data table of the same job file, for the sequence length.
        vocabulary: the tokenizer's. None leaves a configuration in `source` unchecked. [model.config] needs one.
        source: folder of a pretrained model, whose configuration is used then.

    Raises:
        ConfigError: a field is unknown, or does not suit the tokenizer or the sequence length.
    """
    if source is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except Exception as error:
            # As below; the file may say anything.
            raise ConfigError(f"{source} holds no transformers configuration: {first_line(error)}") from error
    else:
        assert vocabulary is not None
        config = _from_fields(dict(model.config or {}), vocabulary)
    entries = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(entries, int):
        raise ConfigError(
            f"{type(config).__name__} has no vocab_size, so this is no language model; name another in "
            f"{'model.config.model_type' if source is None else 'model.path'}"
        )
    if vocabulary is not None and vocabulary.size > entries:
        raise ConfigError(
            f"model.config.vocab_size is {entries}, but the tokenizer has {vocabulary.size} tokens; "
            "raise it, or leave it out to take the tokenizer's"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but the model takes at most {longest} positions "
            "(max_position_embeddings)"
        )
    return config


def most_tokens(model: Any) -> int | None:
    """Return how many tokens of a sequence a model takes, None where there is no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        # RoBERTa and its kin count positions from behind the padding's index.
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
            limit = table.num_embeddings - table.padding_idx - 1
    return limit if isinstance(limit, int) else None


def check_length(model: Any, data: DataConfig) -> None:
    """Raise ConfigError when a model has fewer positions than a sequence has tokens."""
    longest = most_tokens(model)
    if longest is not None and data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but a sequence of this model has at most {longest} tokens"
        )


def _from_fields(fields: dict[str, Any], vocabulary: Vocabulary) -> Any:
    kind = str(fields.pop("model_type"))
    fields.setdefault("vocab_size", vocabulary.size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(vocabulary, name))
    try:
        plain = transformers.AutoConfig.for_model(kind)
        unknown = sorted(name for name in fields if not hasattr(plain, name) or callable(getattr(plain, name)))
        config = transformers.AutoConfig.for_model(kind, **fields)
    except Exception as error:
        # Each configuration of transformers raises errors of its own. Their texts name the field.
        raise ConfigError(f"model.config is no configuration of {kind!r}: {_message(error)}") from error
    if unknown:
        raise ConfigError(f"model.config.{unknown[0]} is no field of {kind!r} configurations")
    _check_fields(fields, config)
    return config


def _check_fields(fields: Mapping[str, Any], config: Any) -> None:
    """Refuse values that transformers accepts in a configuration and cannot make a model of. Errors name the field."""
    for name in _ACTIVATIONS:
        if isinstance(given := fields.get(name), str) and given not in ACT2FN:
            near = difflib.get_close_matches(given, ACT2FN, n=3) or ["gelu", "relu", "silu"]
            raise ConfigError(f"model.config.{name} is {given!r}, no activation of transformers; try {', '.join(near)}")
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if "num_key_value_heads" in fields and isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ConfigError(
            f"model.config.num_key_value_heads must divide num_attention_heads, which is {heads}, got {shared}: all "
            "keys and values serve equally many queries"
        )


def empty_model(job: JobConfig, config: Any) -> Any:
    """Return the module of a configuration on the meta device: shapes without memory, whatever its size.

    Raises:
        ConfigError: the configuration makes no model of the task, or its fields contradict each other.
    """
    try:
        with torch.device("meta"):
            return MODEL_CLASSES[job.model.task].from_config(config)
    except Exception as error:
        # As with configurations, the code of a model may raise any error.
        raise cannot_be_made(job.model, config, error) from error


def captured_model(job: JobConfig, model: Any, *, evaluation: bool) -> Captured:
    """Return the graph of a configuration's module, with its weights. `evaluation` as in `capture_transformers`.

    Raises:
        ConfigError: the module was made, but does not run: its fields contradict each other.
        GraphError: it cannot become an OP-DAG.
    """
    try:
        return capture_transformers(model, job.model.task, name=job.name, evaluation=evaluation)
    except FusionError:
        raise
    except Exception as error:
        raise cannot_be_made(job.model, model.config, error) from error


def cannot_be_made(model: ModelConfig, config: Any, error: BaseException) -> ConfigError:
    """Return the error for a model that transformers or torch refuse to make or to run."""
    log.debug("no model", exc_info=error)
    where = "[model.config]" if model.path is None else f"the configuration of {model.path}"
    kind = type(config).__name__
    # A key that is not found is the value of a field that names one of a few; its text is only the key.
    field = next((name for name, value in _named(config.to_dict()) if error.args and value == error.args[0]), None)
    if isinstance(error, KeyError) and field is not None:
        return ConfigError(
            f"{where} makes no model: transformers knows no {field} = {error.args[0]!r}; see the fields of {kind}"
        )
    return ConfigError(
        f"{where} makes no model: {type(error).__name__}: {_message(error)}; see which of its fields contradict each "
        f"other, and the fields of transformers' {kind}"
    )


def _named(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts in a configuration and in its tables, by field."""
    for name, value in fields.items():
        if isinstance(value, str):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
