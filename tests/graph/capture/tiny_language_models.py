"""Small language models of each supported family, without dropout, for the tests of capture."""

from __future__ import annotations

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}


def config(family: str, layers: int) -> PretrainedConfig:
    """Return a tiny config of a model family."""
    match family:
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=64,
                n_embd=32,
                n_layer=layers,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        case "llama":
            return transformers.LlamaConfig(**_GROUPED, num_hidden_layers=layers)
        case "qwen3":
            return transformers.Qwen3Config(**_GROUPED, num_hidden_layers=layers, head_dim=8)
        case "gemma3":
            kinds = ["sliding_attention", "full_attention"] * layers
            return transformers.Gemma3TextConfig(
                **_GROUPED, num_hidden_layers=layers, head_dim=8, sliding_window=6, layer_types=kinds[:layers]
            )
        case "mixtral":
            return transformers.MixtralConfig(
                **_GROUPED, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2
            )
        case "qwen3_moe":
            return transformers.Qwen3MoeConfig(
                **_GROUPED,
                num_hidden_layers=layers,
                head_dim=8,
                moe_intermediate_size=16,
                num_experts=4,
                num_experts_per_tok=2,
            )
        case "bert":
            return transformers.BertConfig(
                **{**_SIZES, "pad_token_id": 0},
                num_hidden_layers=layers,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
    raise ValueError(family)


def language_model(family: str, layers: int) -> PreTrainedModel:
    """Return a model with random weights, always the same."""
    torch.manual_seed(7)
    if family == "bert":
        return transformers.BertForMaskedLM(config(family, layers))
    return transformers.AutoModelForCausalLM.from_config(config(family, layers))
