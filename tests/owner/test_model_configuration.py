"""What a model's configuration allows of the data."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMaskedLM, RobertaConfig

from fusionai.errors import ConfigError
from fusionai.owner.model_configuration import check_length
from fusionai.training.config import DataConfig


def test_a_model_that_counts_positions_from_behind_the_padding_takes_fewer_tokens() -> None:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = AutoModelForMaskedLM.from_config(RobertaConfig(max_position_embeddings=20, pad_token_id=1, **sizes))
    longest = torch.full((1, 18), 5)
    assert model(input_ids=longest).logits.shape[1] == 18
    check_length(model, DataConfig(sequence_length=18))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 19), 5))
    with pytest.raises(
        ConfigError, match=r"data\.sequence_length is 19, but a sequence of this model has at most 18 tokens"
    ):
        check_length(model, DataConfig(sequence_length=19))
