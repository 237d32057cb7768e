"""Samples text from a checkpoint on one machine, with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from fusionai.errors import CheckpointError, ConfigError
from fusionai.training.checkpoint import CheckpointReader, WeightFiles, latest
from fusionai.training.checkpoint.manifest import MANIFEST


def sample(folder: Path, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """Return `prompt` continued by at most `tokens` tokens of the model in a checkpoint or run folder.

    Raises ConfigError for impossible arguments, and CheckpointError for a folder that is damaged or holds no
    causal language model.
    """
    if tokens < 1 or temperature < 0:
        raise ConfigError(f"--tokens must be >= 1 and --temperature >= 0, got {tokens} and {temperature}")
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    folder = latest(folder) or folder
    if (folder / MANIFEST).exists():
        CheckpointReader(folder).verify()
    else:
        WeightFiles(folder)  # made by others: no hashes, but its files must be whole
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder} holds no causal language model with its tokenizer: {reason}") from error
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]])
    torch.manual_seed(seed)
    choice = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        output = model.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            **choice,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
