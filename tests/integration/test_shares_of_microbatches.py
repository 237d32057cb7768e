"""Microbatches count in a pool for what they count for in plain torch, whose batch is not cut at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusionai
from fusionai.errors import ConfigError, DataError
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.training_job import Observer, StepEvent, TrainingResult
from fusionai.pool.messages import JobLaunched

STEPS, RATE = 3, 0.05
Batch = dict[str, Tensor]


class Net(nn.Module):
    """An embedding, four linear layers and a head, with a loss that the test gives."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8)
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.head = nn.Linear(8, 9)
        self._loss = (loss,)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        return self._loss[0](self.head(self.layers(self.embedding(input_ids))), labels)


def entropy(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, labels: F.cross_entropy(scores.flatten(0, 1), labels.flatten(), **options)


def padded(padding: int, counted: int = 1) -> Callable[[int, int], Batch]:
    """Return two microbatches of 2 x 10 tokens. In the second one only the first `counted` columns have a label."""

    def batch(step: int, index: int) -> Batch:
        ids = (torch.arange(20) + 3 * step).reshape(2, 10) % 8 + 1
        labels = ids.clone()
        if index:
            labels[:, counted:] = padding
        return {"input_ids": ids, "labels": labels}

    return batch


def together(batch: Callable[[int, int], Batch], step: int, microbatches: int = 2) -> Batch:
    parts = [batch(step, index) for index in range(microbatches)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def alone(module: nn.Module, batch: Callable[[int, int], Batch], gradient_clip: float = 0.0) -> list[float]:
    """Train in this process on whole batches; return the losses."""
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = module(**together(batch, step))
        loss.backward()
        if gradient_clip:
            nn.utils.clip_grad_norm_(module.parameters(), gradient_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


class Seen(Observer):
    """Keeps the losses, the microbatches that were run, and what the owner is shown of the plan."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.run: list[int] = []
        self.explanation: tuple[str, ...] = ()

    def launched(self, launched: JobLaunched, machines: Any) -> None:
        self.explanation = launched.plan.explanation

    def stepped(self, event: StepEvent) -> None:
        self.losses.append(event.loss)
        self.run.append(event.result.microbatches)


def train(
    module: nn.Module, batch: Callable[[int, int], Batch], pool: LocalPool, folder: Path, **options: Any
) -> tuple[TrainingResult, Seen]:
    seen = Seen()
    result = fusionai.train(
        module,
        batch,
        broker=pool.token,
        compnodes=2,
        steps=STEPS,
        microbatches=2,
        learning_rate=RATE,
        optimizer=OptimizerConfig(kind="sgd"),
        run=folder / "run",
        observer=seen,
        **options,
    )
    return result, seen


def assert_equal_weights(found: nn.Module, expected: nn.Module) -> None:
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], tensor, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    ("options", "padding", "first_loss", "clip"),
    [
        ({"ignore_index": 0}, 0, 2.24155, 0.0),
        ({"reduction": "sum"}, -100, 49.314, 0.5),
    ],
    ids=["an ignored label of its own", "a sum"],
)
def test_losses_and_weights_are_those_of_the_whole_batch(
    options: dict[str, Any], padding: int, first_loss: float, clip: float, pool: LocalPool, tmp_path: Path
) -> None:
    expected, trained = Net(entropy(**options)), Net(entropy(**options))
    losses = alone(expected, padded(padding), clip)
    heldout = [padded(padding)(7, index) for index in range(2)]
    result, seen = train(trained, padded(padding), pool, tmp_path, gradient_clip=clip, heldout=heldout)
    assert seen.losses[0] == pytest.approx(first_loss, abs=1e-4)
    assert seen.losses == pytest.approx(losses, rel=1e-5)
    assert_equal_weights(trained, expected)
    with torch.no_grad():
        assert result.heldout_loss == pytest.approx(expected(**together(padded(padding), 7)).item(), rel=1e-5)
    summed = "reduction" in options
    assert any("added up" in line for line in seen.explanation) == summed
    assert any("added up" in line for line in json.loads((tmp_path / "run/plan.json").read_text())["explanation"]) == (
        summed
    )


def test_a_microbatch_without_a_label_that_counts_is_not_run(pool: LocalPool, tmp_path: Path) -> None:
    expected, trained = Net(entropy(ignore_index=0)), Net(entropy(ignore_index=0))
    batch = padded(0, counted=0)
    losses = alone(expected, batch)
    result, seen = train(trained, batch, pool, tmp_path, heldout=[batch(9, 1), batch(9, 0)])
    assert seen.losses == pytest.approx(losses, rel=1e-5)
    assert seen.run == [1, 1, 1]
    assert_equal_weights(trained, expected)
    with torch.no_grad():
        assert result.heldout_loss == pytest.approx(expected(**together(batch, 9)).item(), rel=1e-5)


def test_a_step_in_which_nothing_counts_is_named(pool: LocalPool, tmp_path: Path) -> None:
    def batch(step: int, index: int) -> Batch:
        found = padded(0)(step, index)
        return {**found, "labels": found["labels"] * (step < 2)}

    with pytest.raises(DataError, match=r"nothing counts in the loss of step 3: .* leave such batches out"):
        train(Net(entropy(ignore_index=0)), batch, pool, tmp_path)


def test_what_cannot_be_told_is_in_the_plan_and_can_be_chosen(pool: LocalPool, tmp_path: Path) -> None:
    def perplexity(scores: Tensor, labels: Tensor) -> Tensor:
        return entropy(ignore_index=0)(scores, labels).exp()

    batch = padded(0)
    parts = [batch(0, index) for index in range(2)]
    with torch.no_grad():
        losses = [Net(perplexity)(**part).item() for part in parts]
    for choice, shares, says in (
        ("auto", (1 / 2, 1 / 2), "the loss puts values of a whole microbatch through aten.exp.default"),
        ("labels", (20 / 22, 2 / 22), 'training.loss_share = "labels"'),
    ):
        _, seen = train(Net(perplexity), batch, pool, tmp_path / choice, loss_share=choice)
        assert seen.losses[0] == pytest.approx(
            sum(share * loss for share, loss in zip(shares, losses, strict=True)), rel=1e-5
        )
        assert any(says in line for line in seen.explanation), seen.explanation


def test_labels_that_are_not_there_cannot_be_counted(pool: LocalPool, tmp_path: Path) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.mse_loss(self.layers(x), x)

    with pytest.raises(
        ConfigError, match=r'training.loss_share is "labels", but the model has no input of int64 labels'
    ):
        train(Autoencoder(), lambda step, index: {"x": torch.ones(3, 4)}, pool, tmp_path, loss_share="labels")
