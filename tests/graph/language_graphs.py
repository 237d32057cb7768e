"""Captured language models of any depth, by name, without allocating their weights."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from torch import Tensor, nn

from fusionai.graph.capture import Captured, capture, capture_transformers
from fusionai.graph.model import OpDag

VOCABULARY = 256


@cache
def llama_graph(layers: int, *, hidden: int = 64, tied: bool = False) -> OpDag:
    """Return the OP-DAG of a Llama with heads of 16 (8 for key and value groups of two), traced on the meta device."""
    heads = max(4, hidden // 128)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return capture_transformers(model.train()).graph


def language_model(kind: str) -> nn.Module:
    """Return a small transformers model of a kind, two layers, dropout off."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    elif kind == "bert":
        config = transformers.BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertForMaskedLM(config).train()
    elif kind == "gemma3_text":
        config = transformers.Gemma3TextConfig(**shape, num_key_value_heads=2, head_dim=16, sliding_window=8)
    elif kind == "mixtral":
        config = transformers.MixtralConfig(
            **shape, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
        )
    else:
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def captured_language_model(kind: str) -> Captured:
    """Capture `language_model(kind)` without comparing values: the capture's own tests do that."""
    model = language_model(kind)
    task = "masked" if kind == "bert" else "causal"
    return capture_transformers(model, task, validate_values=False)  # type: ignore[arg-type]


class ResidualNet(nn.Module):
    """Images (B, 3, H, W) and classes (B,) to a loss, with batch norm, a residual block and pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.stem(images)))
        hidden = nn.functional.max_pool2d(torch.relu(hidden + self.block(hidden)), 2)
        hidden = torch.relu(self.down(hidden)).mean(dim=(2, 3))
        return nn.functional.cross_entropy(self.head(hidden), labels)


def residual_batch(rows: int, side: int) -> dict[str, Tensor]:
    """Return random images and classes."""
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(rows, 3, side, side, generator=generator),
        "labels": torch.randint(0, 10, (rows,), generator=generator),
    }


def captured_residual_net() -> Captured:
    """Capture a `ResidualNet`."""
    return capture(ResidualNet().train(), residual_batch(4, 16), validate_values=False)
