"""Held-out losses of a pool equal those of `module.eval()` in plain torch, where evaluation mode differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import train_alone
from torch import nn

import fusionai
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.training_job import Observer, StepEvent
from two_faced_models import (
    ROLES,
    AlwaysBatchStatistics,
    AuxiliaryHead,
    LayerDropped,
    Net,
    OtherLoss,
    Reversed,
    Skipping,
    batch,
)

STEPS, MICROBATCHES = 3, 2
HELDOUT = [batch(1000 + index) for index in range(2)]


class Heard(Observer):
    """Keeps the losses of training and evaluation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations: list[float] = []

    def stepped(self, event: StepEvent) -> None:
        self.losses.append(event.loss)
        assert event.evaluation is not None
        self.evaluations.append(event.evaluation)


def microbatch(step: int, index: int) -> dict[str, torch.Tensor]:
    return batch(10 * step + index)


class Alone(nn.Module):
    """A module whose loss is the first of what it returns."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        output = self.net(tokens, labels)
        return output[0] if isinstance(output, tuple) else output


def alone(kind: type[Net]) -> tuple[Net, list[float], list[float]]:
    """Train and evaluate in plain torch, step by step."""
    net, losses, evaluations = kind(), [], []
    wrapped = Alone(net)
    for step in range(STEPS):
        losses += train_alone(
            wrapped.train(),
            lambda _, index, step=step: microbatch(step, index),
            steps=1,
            microbatches=MICROBATCHES,
            optimizer={"kind": "sgd"},
            learning_rate=0.05,
        )
        wrapped.eval()
        with torch.no_grad():
            evaluations.append(sum(float(wrapped(**each)) for each in HELDOUT) / len(HELDOUT))
    return net, losses, evaluations


@pytest.mark.parametrize(
    ("kind", "privacy"),
    [
        (OtherLoss, "private"),
        (OtherLoss, "open"),
        (AuxiliaryHead, "private"),
        (AuxiliaryHead, "open"),
        (LayerDropped, "private"),
        (Skipping, "open"),
        (Reversed, "open"),
        (AlwaysBatchStatistics, "private"),
    ],
)
def test_held_out_losses_are_those_of_evaluation_mode(
    kind: type[Net], privacy: Any, pool: LocalPool, tmp_path: Path
) -> None:
    expected, losses, evaluations = alone(kind)
    net, heard = kind(), Heard()
    result = fusionai.train(
        net,
        microbatch,
        broker=pool.token,
        roles=ROLES,  # type: ignore[arg-type]
        steps=STEPS,
        microbatches=MICROBATCHES,
        learning_rate=0.05,
        optimizer=OptimizerConfig(kind="sgd"),
        privacy=privacy,
        compnodes=2,
        heldout=HELDOUT,
        evaluate_every=1,
        run=tmp_path / "run",
        observer=heard,
    )
    assert heard.losses == pytest.approx(losses, rel=1e-6)
    assert heard.evaluations == pytest.approx(evaluations, rel=1e-6)
    assert result.heldout_loss == heard.evaluations[-1]
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert net.training
