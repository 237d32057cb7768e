"""Buffers that forward changes, and positions of a model's own, over a pool of processes as in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import Batch, train_alone
from torch import Tensor, nn
from torch.nn import functional

import fusionai
from fusionai.errors import DataError
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.training_job import Observer, StepEvent
from fusionai.training.checkpoint import CheckpointReader

STEPS, MICROBATCHES = 3, 2
SGD = {"kind": "sgd", "momentum": 0.9}


class Losses(Observer):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def stepped(self, event: StepEvent) -> None:
        self.values.append(event.loss)


class Stateful(nn.Module):
    """Keeps a count, a running mean of activations, and the frequencies of the labels it has seen."""

    seen: Tensor
    mean: Tensor
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.head = nn.Linear(16, 5)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("frequencies", torch.ones(5))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        for number, layer in enumerate(self.layers):
            if number == 1:
                self.seen = self.seen + 1
                hidden = hidden * (1 + 0.1 / self.seen)
            if number == 2:
                with torch.no_grad():
                    self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
                hidden = hidden - self.mean
            hidden = torch.tanh(layer(hidden))
        logits = self.head(hidden) - self.frequencies.log()
        loss = functional.cross_entropy(logits, labels)
        self.frequencies = self.frequencies + functional.one_hot(labels, 5).float().sum(0)
        return loss


def vectors(step: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + index)
    return {
        "x": torch.randn(6, 8, generator=generator),
        "labels": torch.randint(0, 5, (6,), generator=generator),
    }


def roberta() -> nn.Module:
    torch.manual_seed(7)
    config = transformers.RobertaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3,
        max_position_embeddings=40, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.RobertaForMaskedLM(config).train()


def padded_tokens(step: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(3, 97, (2, 10), generator=generator)
    ids[0, 8:] = 1
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) % 3 > 0, -100)}


def assert_trains_as_alone(
    make: Callable[[], nn.Module], batch: Callable[[int, int], Batch], pool: LocalPool, run: Path, privacy: Any
) -> Path:
    """Train in both ways, compare losses, parameters and buffers, and return the checkpoint."""
    alone, together = make(), make()
    expected = train_alone(alone, batch, steps=STEPS, microbatches=MICROBATCHES, optimizer=SGD, learning_rate=1e-2)
    losses = Losses()
    result = fusionai.train(
        together, batch, broker=pool.token, steps=STEPS, microbatches=MICROBATCHES, learning_rate=1e-2,
        optimizer=OptimizerConfig(**SGD), privacy=privacy, compnodes=2, run=run, observer=losses,
    )  # fmt: skip
    assert losses.values == pytest.approx(expected, rel=1e-5)
    for name, tensor in together.state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)
    return Path(result.checkpoint)


@pytest.mark.parametrize("privacy", ["private", "open"])
def test_buffers_that_forward_changes(pool: LocalPool, tmp_path: Path, privacy: str) -> None:
    checkpoint = assert_trains_as_alone(Stateful, vectors, pool, tmp_path / "run", privacy)
    reader = CheckpointReader(checkpoint)
    assert int.from_bytes(bytes(reader.read("seen").data), "little") == STEPS * MICROBATCHES


@pytest.mark.parametrize("privacy", ["private", "open"])
def test_positions_that_the_model_makes(pool: LocalPool, tmp_path: Path, privacy: str) -> None:
    assert_trains_as_alone(roberta, padded_tokens, pool, tmp_path / "run", privacy)


class Positional(nn.Module):
    """Takes positions as an argument, as packed documents need it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.tokens, self.places = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        self.head = nn.Linear(16, 20)

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.layers(self.tokens(input_ids) + self.places(position_ids))
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def packed(step: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(0, 20, (2, 10), generator=generator)
    return {"input_ids": ids, "position_ids": (torch.arange(10) % (4 + index)).repeat(2, 1), "labels": ids}


def test_positions_that_the_user_gives(pool: LocalPool, tmp_path: Path) -> None:
    assert_trains_as_alone(Positional, packed, pool, tmp_path / "run", "private")

    def counted_at_first(step: int, index: int) -> Batch:
        found = packed(step, index)
        return found if index else {**found, "position_ids": torch.arange(10).repeat(2, 1)}

    with pytest.raises(DataError, match="'position_ids' has the role 'positions'"):
        fusionai.train(
            Positional(), counted_at_first, broker=pool.token, steps=1, microbatches=2, compnodes=1,
            roles={"position_ids": "positions"}, run=tmp_path / "refused",
        )  # fmt: skip
