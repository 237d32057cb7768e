"""The models of the headline, captured on the meta device: shapes without weights, whatever their size."""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers

from fusionai.graph.capture import capture_transformers
from fusionai.owner.model_configuration import MODEL_CLASSES
from fusionai.simulation.headline.costs import Model

_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

MODELS: dict[str, tuple[str, Literal["causal", "masked"], int, dict[str, Any]]] = {
    "bert-large": (
        "bert",
        "masked",
        512,
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2-xl": ("gpt2", "causal", 1024, {"n_layer": 48, "n_embd": 1600, "n_head": 25, **_NO_IDS}),
    "llama-8b": (
        "llama",
        "causal",
        2048,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "vocab_size": 128256,
            **_NO_IDS,
        },
    ),
    "gpt3-175b": (
        "gpt2",
        "causal",
        2048,
        {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, **_NO_IDS},
    ),
}
"""By name: kind of configuration, task, tokens of a sample, and the fields that differ from the kind's defaults."""


def captured(name: str, fields: dict[str, Any] | None = None) -> Model:
    """Return one of `MODELS`, with weights and activations of bf16. Blocks for seconds.

    Args:
        name: a key of `MODELS`.
        fields: of the configuration, instead of the model's own: for tests.
    """
    kind, task, tokens, own = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**own, **(fields or {})})
    with torch.device("meta"):
        module = MODEL_CLASSES[task].from_config(config, dtype=torch.bfloat16)
    graph = capture_transformers(module, task, name=name, evaluation=False).graph
    # Every symbol is an axis of a batch of token sequences.
    return Model(
        name=name,
        graph=graph,
        tokens=tokens,
        sizes=lambda batch: {symbol: (batch, tokens)[axis] for symbol, (_, axis) in graph.symbols.items()},
    )
