"""The shares of microbatches: however a batch is cut, its loss is the mean over all labels that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fusionai.errors import DataError
from fusionai.execution.planes import plane
from fusionai.graph.capture import Captured, capture, capture_transformers
from fusionai.tensor import TensorData
from fusionai.training.loss_weights import LossWeights

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


def model_of(kind: str) -> Any:
    torch.manual_seed(2)
    masked = kind == "bert"
    config = transformers.AutoConfig.for_model(kind, **SHAPE, **(FRESH if masked else {}))
    auto: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    return auto.from_config(config)


def assert_the_whole(model: Any, found: Captured, batch: dict[str, torch.Tensor]) -> LossWeights:
    """Compare the weighed losses of single rows with the loss of all rows together."""
    weights = LossWeights(found.graph, "auto", plane("torch"), found)
    parts = [{name: rows[row : row + 1] for name, rows in batch.items()} for row in range(len(batch["labels"]))]
    shares = weights.weigh([{name: data(rows) for name, rows in part.items()} for part in parts], "step 1")
    with torch.no_grad():
        whole = model(**batch).loss.item()
        losses = [model(**part).loss.item() if share else 0.0 for part, share in zip(parts, shares, strict=True)]
    together = sum(share * loss for share, loss in zip(shares, losses, strict=True))
    assert together == pytest.approx(whole, rel=1e-6)
    assert sum(shares) == pytest.approx(1)
    return weights


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_cut_batch_has_the_loss_of_the_whole(kind: str) -> None:
    """Rows of very different lengths, as in fine-tuning on padded text; one has no label at all."""
    model = model_of(kind)
    found = capture_transformers(model, "masked" if kind == "bert" else "causal", name=kind)
    weights = assert_the_whole(model, found, token_batch([2, 12, 0, 9]))
    assert not weights.remark
    empty = {"input_ids": data(torch.ones(1, 12, dtype=torch.int64)), "labels": data(torch.full((1, 12), -100))}
    with pytest.raises(
        DataError, match=r"nothing counts in the loss of the held-out batch: .* over all 2 microbatches"
    ):
        weights.weigh([empty, empty], "the held-out batch")


def test_the_number_of_labels_that_transformers_divides_by_is_counted() -> None:
    """Trainers of transformers give `num_items_in_batch`, and the loss is a sum over labels divided by it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of("llama")

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, labels=labels, num_items_in_batch=(labels != -100).sum())

    model = Counting()
    found = capture(model, token_batch([2, 12]), validate_values=False)
    assert_the_whole(model, found, token_batch([2, 12, 3, 9]))
