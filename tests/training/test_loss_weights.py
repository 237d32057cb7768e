"""The shares of microbatches: however a batch is cut, its loss is the mean over all labels that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fusionai.errors import DataError
from fusionai.graph.capture import capture, capture_transformers
from fusionai.tensor import TensorData
from fusionai.training.loss_weights import loss_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
FRESH = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def data(tensor: torch.Tensor) -> TensorData:
    return TensorData("int64", tuple(tensor.shape), tensor.numpy().tobytes())


def token_batch(labels_by_row: list[int]) -> dict[str, torch.Tensor]:
    """Return rows of 12 tokens, of which the first so many have a label that counts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32, (len(labels_by_row), 12), generator=generator)
    counts = torch.arange(12)[None] < torch.tensor(labels_by_row)[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~counts, -100)}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_cut_batch_has_the_loss_of_the_whole(kind: str) -> None:
    """Rows of very different lengths, as in fine-tuning on padded text."""
    torch.manual_seed(2)
    masked = kind == "bert"
    config = transformers.AutoConfig.for_model(kind, **SHAPE, **(FRESH if masked else {}))
    auto: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    batch = token_batch([2, 12, 3, 9])
    graph = capture_transformers(model, "masked" if masked else "causal", name=kind).graph
    with torch.no_grad():
        whole = model(**batch).loss.item()
        parts = [{name: rows[row : row + 1] for name, rows in batch.items()} for row in range(4)]
        losses = [model(**part).loss.item() for part in parts]
    shares = loss_weights(graph, [{name: data(rows) for name, rows in part.items()} for part in parts])
    assert sum(shares) == pytest.approx(1)
    together = sum(share * loss for share, loss in zip(shares, losses, strict=True))
    assert together == pytest.approx(whole, rel=1e-6)
    with pytest.raises(DataError, match="every label"):
        loss_weights(graph, [{"labels": data(torch.full((1, 12), -100))}])


class Regression(nn.Module):
    """Labels that are no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the squared error."""
        return nn.functional.mse_loss(self.layer(x), labels)


def test_labels_that_are_no_classes_weigh_equally() -> None:
    graph = capture(Regression(), {"x": torch.randn(4, 3), "labels": torch.randn(4, 1)}, name="regression").graph
    assert loss_weights(graph, [{}, {}]) == (0.5, 0.5)
