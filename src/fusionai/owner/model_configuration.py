"""From the model table of a job file to a transformers configuration, and to a model without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fusionai.errors import ConfigError
from fusionai.training.config import DataConfig, JobConfig, ModelConfig

MODEL_CLASSES: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
}

ALL_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt")
"""What is fetched of a model on the hub to train it: no code, and no pickled weights."""

CONFIGURATION_FILES = ("config.json",)
"""What is fetched to plan for it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a configuration takes from a tokenizer."""

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
        # The hub's client raises many kinds, of several libraries; each means that the model cannot be had.
        raise ConfigError(
            f"model.path {model.path!r} is no folder here and cannot be fetched from the hub ({first_line(error)}); "
            "check the name and the connection, or give a folder"
        ) from error


def configuration(model: ModelConfig, data: DataConfig, vocabulary: Vocabulary | None, source: Path | None) -> Any:
    """Return the transformers configuration, checked against the vocabulary and the sequence length.

    Args:
        model: the table of the job file.
        data: its neighbour; the sequence length is its.
        vocabulary: of the tokenizer; None leaves a configuration in `source` unchecked. [model.config] needs one.
        source: folder of a pretrained model, whose configuration is taken then.

    Raises:
        ConfigError: a field is unknown, or does not suit the tokenizer or the sequence length.
    """
    if source is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source} holds no transformers configuration: {first_line(error)}") from error
    else:
        assert vocabulary is not None
        config = _from_fields(dict(model.config or {}), vocabulary)
    if vocabulary is not None and vocabulary.size > config.vocab_size:
        raise ConfigError(
            f"model.config.vocab_size is {config.vocab_size}, but the tokenizer has {vocabulary.size} tokens; "
            "raise it, or leave it out to take the tokenizer's"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but the model takes at most {longest} positions "
            "(max_position_embeddings)"
        )
    return config


def _from_fields(fields: dict[str, Any], vocabulary: Vocabulary) -> Any:
    kind = str(fields.pop("model_type"))
    fields.setdefault("vocab_size", vocabulary.size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(vocabulary, name))
    try:
        plain = transformers.AutoConfig.for_model(kind)
        unknown = sorted(name for name in fields if not hasattr(plain, name))
        config = transformers.AutoConfig.for_model(kind, **fields)
    except Exception as error:
        # transformers raises whatever its many configurations do; the text says which field it is about.
        raise ConfigError(f"model.config is no configuration of {kind!r}: {_message(error)}") from error
    if unknown:
        raise ConfigError(f"model.config.{unknown[0]} is no field of {kind!r} configurations")
    return config


def empty_model(job: JobConfig, config: Any) -> Any:
    """Return the module of a configuration on the meta device: shapes without memory, whatever its size.

    Raises:
        ConfigError: the configuration makes no model of the task, or its fields contradict each other.
    """
    try:
        with torch.device("meta"):
            return MODEL_CLASSES[job.model.task].from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_be_made(error) from error


def cannot_be_made(error: BaseException) -> ConfigError:
    """Return what is to be said when transformers refuses to make a model."""
    return ConfigError(f"the model cannot be made: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
