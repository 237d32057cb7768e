"""Samples text from a checkpoint on one machine, with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from fusionai.errors import CheckpointError, ConfigError
from fusionai.owner.model_configuration import first_line, most_tokens
from fusionai.training.checkpoint import CheckpointReader, WeightFiles, latest
from fusionai.training.checkpoint.manifest import MANIFEST

_TEMPERATURES = (1e-3, 1e3)
"""Least and largest temperature. Beyond them the scaled logits leave the range of float32, or are all alike."""


def sample(folder: Path, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """Return `prompt` continued by at most `tokens` tokens of the model in a checkpoint or run folder.

    Raises ConfigError for impossible arguments, and CheckpointError for a folder that is damaged or holds no
    causal language model with its tokenizer.
    """
    _check_arguments(prompt, tokens, temperature, seed)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    folder = latest(folder) or folder
    if (folder / MANIFEST).exists():
        CheckpointReader(folder).verify()
    else:
        WeightFiles(folder)  # made by others: no hashes, but its files must be whole
    model, tokenizer = _load(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        ids = torch.tensor([[_first_token(tokenizer)]])
    _check_tokens(folder, model, tokenizer, ids, tokens)
    torch.manual_seed(seed)
    choice = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        output = model.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=[_Finite(folder)],
            **choice,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _check_arguments(prompt: str, tokens: int, temperature: float, seed: int) -> None:
    least, most = _TEMPERATURES
    if tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, got {tokens}")
    if not (temperature == 0 or least <= temperature <= most):
        raise ConfigError(f"--temperature must be 0 or from {least:g} to {most:g}, got {temperature:g}")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"--seed must be from 0 to 2^63 - 1, got {seed}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--prompt is no valid text: character {error.start + 1} is half of a character or a byte that is not UTF-8"
        ) from error


def _load(folder: Path) -> tuple[Any, Any]:
    """Return the causal model of a folder, and its tokenizer."""
    no_model = f"{folder} holds no causal language model"
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{no_model}: {first_line(error)}") from error
    _check_causal(folder, config)
    if not _has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer, which checkpoints of the Python API do not have: save it there, by "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{no_model} with its tokenizer: {first_line(error)}") from error
    # transformers would draw what is missing at random.
    absent = sorted([*loaded["missing_keys"], *(str(each) for each in loaded["mismatched_keys"])])
    if absent:
        raise CheckpointError(f"{folder} lacks the weight {absent[0]!r} of {type(model).__name__}: {no_model}")
    return model, tokenizer


def _check_causal(folder: Path, config: Any) -> None:
    """Refuse models that do not continue text. transformers would load most of them, and make nonsense."""
    kind = str(config.model_type)
    classes = [str(each) for each in getattr(config, "architectures", None) or ()]
    remedy = "fusionai generate continues text, which takes a causal model"
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{folder} holds an encoder-decoder model ({kind}); {remedy}")
    masked = [each for each in classes if each.endswith("ForMaskedLM")]
    # A checkpoint of an older version does not say. These kinds are masked models unless they are decoders.
    masks = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if masked or (not classes and masks):
        raise CheckpointError(
            f"{folder} holds a masked language model ({(masked or [kind])[0]}), which guesses tokens in the midst of a "
            f"text; {remedy}"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "spiece*", "*.bpe"))


def _first_token(tokenizer: Any) -> int:
    """Return what to continue where there is no prompt."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise ConfigError("--prompt is empty, and the tokenizer has no token to begin a text with; give a prompt")


def _check_tokens(folder: Path, model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int) -> None:
    """Refuse a prompt that the model has no embeddings for, and more tokens than it has positions for."""
    entries = model.get_input_embeddings().num_embeddings
    largest = int(ids.max())
    if largest >= entries:
        raise CheckpointError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens and the model {entries}: the prompt has token "
            f"{largest}; save the tokenizer there that the model was trained with"
        )
    positions, given = most_tokens(model), ids.shape[1]
    if positions is not None and given + tokens > positions:
        room = positions - given
        remedy = f"ask for at most {room} (--tokens {room})" if room > 0 else "give a shorter prompt"
        raise ConfigError(
            f"the prompt has {given} tokens and --tokens asks for {tokens} more, but the model has {positions} "
            f"positions: {remedy}"
        )


class _Finite(transformers.LogitsProcessor):  # type: ignore[misc]
    """Refuses logits that are no numbers: the likeliest of them would be an accident."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        if bool((torch.isnan(scores) | torch.isposinf(scores)).any()):
            raise CheckpointError(
                f"the model in {self._folder} computes logits that are no numbers: its training went wrong. Take an "
                "earlier checkpoint"
            )
        return scores
