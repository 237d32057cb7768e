"""Random losses against plain torch: the graph gives exact shares, or the plan says that it cannot tell."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from test_loss_shares import (
    Loss,
    Model,
    as_data,
    captured_together,
    joined,
    loss_and_gradients,
    of_tokens,
    parts_of,
    probabilities,
    shares,
)
from torch import Tensor
from torch.nn import functional as F

from fusionai.errors import DataError

TOGETHER = 15
"""Losses that are traced at once."""


def random_loss(seed: int) -> Loss:
    """Return a loss of a few random operators; the same one whenever it is called."""
    return lambda model, scores, labels: _Draw(seed, model, scores, labels).scalar()


class _Draw:
    def __init__(self, seed: int, model: Model, scores: Tensor, labels: Tensor) -> None:
        self.draw = random.Random(seed)
        self.model, self.scores, self.labels = model, scores, labels
        self.mask = (labels != 0).float()
        ignoring = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=0)
        self.all_rows = (
            of_tokens(scores, labels),
            ignoring.view_as(labels),
            (scores - probabilities(labels)).square().sum(-1),
            self.mask * of_tokens(model.second(scores), labels),
        )

    def rows(self) -> Tensor:
        """Return a number for each token."""
        found = self.draw.choice(self.all_rows)
        steps: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: x * self.mask,
            lambda x: x / self.mask.sum().clamp(min=1),
            lambda x: x * 0.5,
            lambda x: x + self.draw.choice(self.all_rows),
            lambda x: torch.where(self.labels == 1, x, 0.0),
            lambda x: x / x.shape[0],
            lambda x: x.relu(),
            lambda x: x * (self.mask / self.mask.mean()),
            lambda x: x / (self.labels.float().sum() + 1e-6),
        )
        for _ in range(self.draw.randint(0, 3)):
            found = self.draw.choice(steps)(found)
        return found

    def scalar(self, depth: int = 0) -> Tensor:
        """Return a number for all tokens."""
        mask, labels = self.mask, self.labels
        below: tuple[Callable[[], Tensor], ...] = (
            lambda: self.rows().sum(),
            lambda: self.rows().mean(),
            lambda: self.rows().sum(1).mean(),
            lambda: self.rows().mean(0).sum(),
            lambda: self.rows().sum() / mask.sum(),
            self.entropy,
        )
        above: tuple[Callable[[], Tensor], ...] = (
            lambda: self.scalar(depth + 1) + self.scalar(depth + 1),
            lambda: self.scalar(depth + 1) / self.draw.choice((mask.sum(), mask.sum().clamp(min=8), mask.mean())),
            lambda: self.scalar(depth + 1) / self.draw.choice((labels.shape[0], labels.numel(), labels.shape[1], 3.0)),
            lambda: self.scalar(depth + 1) * self.draw.choice((2.0, labels.shape[0], mask.sum(), mask.sum(1).mean())),
            lambda: self.scalar(depth + 1) + self.model.head.weight.square().sum(),
            lambda: torch.stack([self.scalar(depth + 1), self.scalar(depth + 1)]).mean(),
            lambda: self.draw.choice((torch.exp, torch.sqrt, torch.neg, torch.abs))(self.scalar(depth + 1)),
        )
        return self.draw.choice((*below, *above) if depth < 3 else below)()

    def entropy(self) -> Tensor:
        return F.cross_entropy(
            self.scores.flatten(0, 1),
            self.labels.flatten(),
            ignore_index=self.draw.choice((0, 1, -100)),
            reduction=self.draw.choice(("mean", "sum")),
            weight=self.draw.choice((None, self.model.class_weights)),
            label_smoothing=self.draw.choice((0.0, 0.1)),
        )


@pytest.mark.parametrize("group", [pytest.param(each, marks=pytest.mark.slow if each else ()) for each in range(8)])
def test_random_losses_are_exact_or_cannot_be_told(group: int) -> None:
    losses = tuple(random_loss(1000 * group + number) for number in range(TOGETHER))
    batch, exact = joined(), 0
    for loss, found in zip(losses, captured_together(losses), strict=True):
        module = Model(loss)
        _, weights = shares(found)
        expected, expected_gradients = loss_and_gradients(module, batch)
        if not torch.isfinite(expected) or "cannot be told" in weights.remark:
            continue
        try:
            given = weights.weigh([as_data(part) for part in parts_of(batch)], "step 1")
        except DataError:  # a term that all microbatches have, and shares that do not add up to 1
            continue
        total, gradients = torch.zeros(()), [torch.zeros_like(each) for each in expected_gradients]
        for weight, part in zip(given, parts_of(batch), strict=True):
            own, slopes = loss_and_gradients(module, part)
            total = total + weight * own
            gradients = [one + weight * other for one, other in zip(gradients, slopes, strict=True)]
        torch.testing.assert_close(total, expected, rtol=2e-5, atol=2e-5)
        for one, other in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * max(1.0, float(other.abs().max())))
        exact += 1
    assert exact >= TOGETHER / 4
