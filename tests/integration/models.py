"""Small models of every kind that FusionAI promises to train exactly, and single-process training of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "head_dim": 8}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": {**SHAPE, "tie_word_embeddings": False},
    "llama-tied": {**SHAPE, "tie_word_embeddings": True},
    "qwen3": GROUPED,
    "gemma3_text": {**GROUPED, "sliding_window": 8},
    "mixtral": {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "bert": {
        **{key: value for key, value in SHAPE.items() if key != "num_key_value_heads"},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
"""By name; the part before a dash is the transformers model type."""

Batch = dict[str, torch.Tensor]


def language_model(name: str) -> nn.Module:
    """Return a small transformers model with fixed weights, in training mode."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name.split("-")[0], **CONFIGURATIONS[name])
    kind: Any = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model: nn.Module = kind.from_config(config)
    return model.train()


def token_batch(name: str, batch_size: int, length: int) -> Callable[[int, int], Batch]:
    """Return batches of random tokens as a function of (step, microbatch)."""

    def batch(step: int, index: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * step + index)
        ids = torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
        if name != "bert":
            return {"input_ids": ids, "labels": ids.clone()}
        masked = torch.rand(ids.shape, generator=generator) < 0.3
        masked[0, index % length] = True
        return {"input_ids": ids.masked_fill(masked, 3), "labels": ids.masked_fill(~masked, -100)}

    return batch


class ConvolutionalNet(nn.Module):
    """A small residual network with batch norm: images (B, 3, 8, 8) and classes (B,) to a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.convolution1 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.convolution2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy loss."""
        hidden = torch.relu(self.norm1(self.stem(images)))
        hidden = hidden + torch.relu(self.norm2(self.convolution1(hidden)))
        hidden = torch.relu(self.convolution2(hidden)).mean(dim=(2, 3))
        return nn.functional.cross_entropy(self.head(hidden), labels)


def image_batch(batch_size: int) -> Callable[[int, int], Batch]:
    """Return batches of random images as a function of (step, microbatch)."""

    def batch(step: int, index: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * step + index)
        return {
            "images": torch.randn(batch_size, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, 5, (batch_size,), generator=generator),
        }

    return batch


def named_parts(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with GPT-2's joint biases of queries, keys and values parted.

    A bias on the keys of softmax attention has no effect, so its gradient is rounding noise around zero, and AdamW
    makes whole steps of it: weights that end in "key.bias" are compared with an absolute bound.
    """
    found: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if key.endswith("c_attn.bias"):
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{key.removesuffix('bias')}{name}.bias"] = part
        else:
            found[key] = tensor
    return found


def shares(parts: list[Batch]) -> list[float]:
    """Return each microbatch's share in the loss: by counted labels."""
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    return [count / sum(counts) for count in counts]


def train_alone(
    model: nn.Module,
    batch: Callable[[int, int], Batch],
    *,
    steps: int,
    microbatches: int,
    optimizer: Mapping[str, Any],
    learning_rate: float,
    gradient_clip: float = 0.0,
    bf16: bool = False,
) -> list[float]:
    """Train in this process with plain torch, changing `model`; return the loss of each step."""
    settings = dict(optimizer)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.pop("kind")]
    algorithm = kind(model.parameters(), lr=learning_rate, **settings)
    losses = []
    for step in range(steps):
        parts = [batch(step, index) for index in range(microbatches)]
        total = 0.0
        algorithm.zero_grad()
        for part, share in zip(parts, shares(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model(**part)
            loss = output if isinstance(output, torch.Tensor) else output.loss
            (loss * share).backward()
            total += share * loss.item()
        if gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        algorithm.step()
        losses.append(total)
    return losses
