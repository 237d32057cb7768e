"""What microbatches count for, read off the graph: their losses and gradients, weighed, are those of the whole batch.

Every loss is compared with plain torch on the joined batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionai.errors import ConfigError, DataError
from fusionai.execution.planes import plane
from fusionai.graph.batch_operators import CLASSIFICATION, ELEMENTWISE_LOSSES
from fusionai.graph.capture import Captured, capture
from fusionai.graph.dependencies import ancestors, producers, reads
from fusionai.graph.loss_shares import Counted, Equal, Shares, Sum, loss_shares
from fusionai.graph.model import OpDag, ValueName
from fusionai.graph.verify import verify_subdag
from fusionai.graph.vocabulary import VOCABULARY
from fusionai.tensor import TensorData
from fusionai.training.loss_weights import LossWeights

ROWS, LENGTH, CLASSES, PARTS = 2, 5, 4, 3
"""Samples in a microbatch, labels in a sample, classes, and microbatches."""

CLASS_WEIGHTS = [0.5, 2.0, 1.0, 3.0]

Loss = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Scores (B, T, C) of tokens (B, T), and a loss that the test gives."""

    class_weights: Tensor
    seen: Tensor

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(CLASSES, 6)
        self.head = nn.Linear(6, CLASSES)
        self.second = nn.Linear(CLASSES, CLASSES)
        self.trained_weights = nn.Parameter(torch.tensor(CLASS_WEIGHTS))
        self.register_buffer("class_weights", torch.tensor(CLASS_WEIGHTS))
        self.register_buffer("seen", torch.zeros(()))
        self._loss = (loss,)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        return self._loss[0](self, self.head(self.embedding(input_ids).tanh()), labels)


def joined(padded: int = 0) -> dict[str, Tensor]:
    """Return PARTS x ROWS samples; labels of the later microbatches are `padded` more and more."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, CLASSES, (PARTS * ROWS, LENGTH), generator=generator)
    labels = torch.randint(1, CLASSES, (PARTS * ROWS, LENGTH), generator=generator)
    place = torch.arange(PARTS * ROWS)[:, None] // ROWS * 2 + torch.arange(LENGTH)
    return {"input_ids": tokens, "labels": labels.masked_fill(place >= LENGTH, padded)}


def parts_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Cut a batch into PARTS microbatches."""
    cut = {name: tensor.chunk(PARTS) for name, tensor in batch.items()}
    return [{name: chunks[index] for name, chunks in cut.items()} for index in range(PARTS)]


def data(tensor: Tensor) -> TensorData:
    return TensorData(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.numpy().tobytes())  # type: ignore[arg-type]


def as_data(batch: dict[str, Tensor]) -> dict[str, TensorData]:
    return {name: data(tensor) for name, tensor in batch.items()}


def shares(found: Captured, choice: Any = "auto") -> tuple[Shares, LossWeights]:
    """Return what a graph says, and what weighs by it."""
    said = loss_shares(found.graph, choice)
    if isinstance(said, Counted):
        for subdag in filter(None, (said.counting, said.merging)):
            verify_subdag(subdag)
    return said, LossWeights(found.graph, choice, torch_plane(), found)


def captured(module: nn.Module, batch: dict[str, Tensor]) -> Captured:
    return capture(module, parts_of(batch)[0], repeats=False, validate_values=False)


@functools.cache
def captured_together(losses: tuple[Loss, ...]) -> tuple[Captured, ...]:
    """Capture the model with each loss. It is traced once with all of them: tracing takes most of the time."""

    def every(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([loss(model, scores, labels) for loss in losses]).sum()

    found = captured(Model(every), joined())
    made = {node.outputs[0]: node for node in found.graph.nodes}
    (stacked,) = reads(made[found.graph.loss])
    return tuple(replace(found, graph=only(found.graph, loss)) for loss in reads(made[stacked]))


def only(graph: OpDag, loss: ValueName) -> OpDag:
    """Return a graph with another loss, and nothing that the loss does not need."""
    kept = sorted(ancestors(graph, [producers(graph.nodes)[loss]]))
    return msgspec.structs.replace(graph, nodes=tuple(graph.nodes[place] for place in kept), loss=loss)


def shares_of(losses: Mapping[str, Loss], name: str, choice: Any = "auto") -> tuple[Shares, LossWeights]:
    return shares(captured_together(tuple(losses.values()))[list(losses).index(name)], choice)


@functools.cache
def torch_plane() -> Any:
    return plane("torch")


def loss_and_gradients(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad()
    loss: Tensor = module(**batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_exact(module: nn.Module, batch: dict[str, Tensor], weights: tuple[float, ...]) -> None:
    """Compare the weighed losses and gradients of microbatches with those of the whole batch."""
    expected, expected_gradients = loss_and_gradients(module, batch)
    total = torch.zeros(())
    gradients = [torch.zeros_like(each) for each in expected_gradients]
    for weight, part in zip(weights, parts_of(batch), strict=True):
        if weight:
            loss, own = loss_and_gradients(module, part)
            total = total + weight * loss
            gradients = [one + weight * other for one, other in zip(gradients, own, strict=True)]
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def entropy(**options: Any) -> Loss:
    return lambda model, scores, labels: F.cross_entropy(scores.flatten(0, 1), labels.flatten(), **options)


def of_tokens(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def masked_mean(divide: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
        mask = (labels != 0).float()
        return divide(of_tokens(scores, labels) * mask, mask)

    return loss


def shifted(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
    padded = F.pad(labels, (0, 1), value=0)[:, 1:]
    return F.cross_entropy(scores.transpose(1, 2), padded, ignore_index=0)


def probabilities(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).float() * 0.8 + 0.05


def own_mask(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
    """Labels that the loss masks by hand before an ordinary cross entropy."""
    return F.cross_entropy(scores.flatten(0, 1), torch.where(labels == 0, -100, labels).flatten())


COUNTED: dict[str, Loss] = {
    "ignored": entropy(ignore_index=0),
    "smoothed": entropy(ignore_index=0, label_smoothing=0.2),
    "shifted": shifted,
    "own mask": own_mask,
    "class weights": lambda model, scores, labels: F.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), weight=model.class_weights, ignore_index=0
    ),
    "class weights, smoothed": lambda model, scores, labels: F.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), weight=model.class_weights, ignore_index=0, label_smoothing=0.1
    ),
    "constant class weights": lambda model, scores, labels: F.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), weight=torch.tensor(CLASS_WEIGHTS)
    ),
    "ignored by size": lambda model, scores, labels: F.cross_entropy(
        scores.flatten(0, 1), torch.where(labels == 0, LENGTH, labels).flatten(), ignore_index=labels.shape[1]
    ),
    "nll": lambda model, scores, labels: F.nll_loss(
        scores.log_softmax(-1).flatten(0, 1), labels.flatten(), ignore_index=0
    ),
    "nll of more axes, weighed": lambda model, scores, labels: F.nll_loss(
        scores.log_softmax(-1).transpose(1, 2), labels, weight=model.class_weights, ignore_index=0
    ),
    "sum over number": lambda model, scores, labels: (
        F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=0, reduction="sum") / (labels != 0).sum()
    ),
    "masked mean": masked_mean(lambda loss, mask: loss.sum() / mask.sum()),
    "masked mean, clamped": masked_mean(lambda loss, mask: loss.sum() / mask.sum().clamp(min=1)),
    "masked mean, clamped at more than some have": masked_mean(lambda loss, mask: loss.sum() / mask.sum().clamp(min=7)),
    "masked mean, with epsilon": masked_mean(lambda loss, mask: loss.sum() / (mask.sum() + 1e-8)),
    "masked mean, with one more": masked_mean(lambda loss, mask: loss.sum() / (mask.sum() + 1)),
    "masked mean, of the larger": masked_mean(
        lambda loss, mask: loss.sum() / torch.maximum(mask.sum(), torch.tensor(1.0))
    ),
    "masked mean, chosen": masked_mean(lambda loss, mask: loss.sum() / torch.where(mask.sum() == 0, 1.0, mask.sum())),
    "masked mean, by a root": masked_mean(lambda loss, mask: loss.sum() / mask.sum().sqrt()),
    "mean of masked over mean of mask": masked_mean(lambda loss, mask: loss.mean() / mask.mean()),
    "shares of the mask": masked_mean(lambda loss, mask: (loss * (mask / mask.sum())).sum()),
    "times the inverse": masked_mean(lambda loss, mask: 0.5 * loss.sum() * mask.sum().reciprocal()),
    "times one over": masked_mean(lambda loss, mask: loss.sum() * (1.0 / mask.sum()) * 3),
    "integer number": lambda model, scores, labels: (
        (of_tokens(scores, labels) * (labels > 0)).sum() / (labels > 0).sum()
    ),
    "number by count_nonzero": masked_mean(lambda loss, mask: loss.sum() / torch.count_nonzero(mask, (0, 1))),
    "number by rows": masked_mean(lambda loss, mask: loss.sum() / mask.sum(1).sum()),
    "number by columns": masked_mean(lambda loss, mask: loss.sum() / mask.sum(0).clamp(min=0.5).sum()),
    "number by the shape of scores": lambda model, scores, labels: (
        (of_tokens(scores, labels)[..., None] * scores.sigmoid() * (labels != 0)[..., None]).sum()
        / ((labels != 0)[..., None].expand_as(scores) * torch.full_like(scores, 0.5)).sum()
    ),
    "l1, weighed": lambda model, scores, labels: F.l1_loss(
        scores, probabilities(labels), weight=(labels != 0).float()[..., None].expand_as(scores)
    ),
    "mse, weighed": lambda model, scores, labels: F.mse_loss(
        scores, probabilities(labels), weight=(labels != 0).float()[..., None].expand_as(scores)
    ),
    "number from a size": masked_mean(lambda loss, mask: loss.sum() / (mask.mean() * mask.numel())),
    "twice": lambda model, scores, labels: (
        entropy(ignore_index=0)(model, scores, labels)
        + 0.3 * entropy(ignore_index=0)(model, model.second(scores), labels)
    ),
    "with a penalty on weights": lambda model, scores, labels: (
        entropy(ignore_index=0)(model, scores, labels) + 0.1 * model.head.weight.square().sum()
    ),
    "penalty and clamped number": masked_mean(
        lambda loss, mask: loss.sum() / mask.sum().clamp(min=1) + 0 * mask.new_zeros(())
    ),
    "in vain": masked_mean(lambda loss, mask: loss.sum() / mask.sum() * mask.sum() / mask.sum()),
    "stacked": lambda model, scores, labels: torch.stack(
        [
            entropy(ignore_index=0)(model, scores, labels),
            entropy(ignore_index=0)(model, model.second(scores), labels),
        ]
    ).mean(),
    "number of samples": lambda model, scores, labels: (
        of_tokens(scores, labels).sum() * (1 / torch.ones(labels.shape[0]).sum())
    ),
    "twice the size": lambda model, scores, labels: of_tokens(scores, labels).mean() / labels.shape[0],
}

EQUAL: dict[str, Loss] = {
    "mse": lambda model, scores, labels: F.mse_loss(scores, probabilities(labels)),
    "l1": lambda model, scores, labels: F.l1_loss(scores, probabilities(labels)),
    "smooth l1": lambda model, scores, labels: F.smooth_l1_loss(scores, probabilities(labels), beta=0.3),
    "huber": lambda model, scores, labels: F.huber_loss(scores, probabilities(labels), delta=0.3),
    "soft margin": lambda model, scores, labels: F.soft_margin_loss(scores, probabilities(labels).round() * 2 - 1),
    "bce": lambda model, scores, labels: F.binary_cross_entropy(scores.sigmoid(), probabilities(labels)),
    "bce, weighed": lambda model, scores, labels: F.binary_cross_entropy(
        scores.sigmoid(), probabilities(labels), weight=(labels != 0).float()[..., None]
    ),
    "bce with logits": lambda model, scores, labels: F.binary_cross_entropy_with_logits(
        scores, probabilities(labels), pos_weight=model.class_weights
    ),
    "kl": lambda model, scores, labels: F.kl_div(scores.log_softmax(-1), probabilities(labels)),
    "kl, batchmean": lambda model, scores, labels: F.kl_div(
        scores.log_softmax(-1), probabilities(labels), reduction="batchmean"
    ),
    "probabilities": lambda model, scores, labels: F.cross_entropy(
        scores.flatten(0, 1), probabilities(labels).flatten(0, 1), weight=model.class_weights
    ),
    "cosine": lambda model, scores, labels: 1 - F.cosine_similarity(scores, probabilities(labels), dim=-1).mean(),
    "mean of tokens": lambda model, scores, labels: of_tokens(scores, labels).mean(),
    "mean of row means": masked_mean(lambda loss, mask: (loss.sum(1) / mask.sum(1).clamp(min=1)).mean()),
    "mean over one axis, then the other": lambda model, scores, labels: of_tokens(scores, labels).mean(0).mean(),
    "sum over the batch size": lambda model, scores, labels: (
        entropy(reduction="sum")(model, scores, labels) / labels.shape[0]
    ),
    "sum over the number of tokens": lambda model, scores, labels: (
        entropy(reduction="sum")(model, scores, labels) / labels.numel()
    ),
    "scaled": lambda model, scores, labels: -2 * (-of_tokens(scores, labels)).mean().squeeze() / 3.0,
    "two means": lambda model, scores, labels: of_tokens(scores, labels).mean() + 0.1 * scores.square().mean(),
    "with a penalty": lambda model, scores, labels: of_tokens(scores, labels).mean() + model.head.weight.abs().sum(),
    "row by row": lambda model, scores, labels: (scores[:, -1] - probabilities(labels)[:, -1]).pow(2).sum(1).mean(),
    "own token": lambda model, scores, labels: F.mse_loss(
        scores[torch.arange(scores.shape[0]), labels.argmax(1)], probabilities(labels)[:, 0]
    ),
}

SUM: dict[str, Loss] = {
    "entropy": entropy(reduction="sum", ignore_index=0),
    "smoothed": entropy(reduction="sum", ignore_index=0, label_smoothing=0.2),
    "mse": lambda model, scores, labels: F.mse_loss(scores, probabilities(labels), reduction="sum"),
    "l1": lambda model, scores, labels: F.l1_loss(scores, probabilities(labels), reduction="sum"),
    "kl": lambda model, scores, labels: F.kl_div(scores.log_softmax(-1), probabilities(labels), reduction="sum"),
    "nll": lambda model, scores, labels: F.nll_loss(
        scores.log_softmax(-1).flatten(0, 1), labels.flatten(), reduction="sum"
    ),
    "masked": masked_mean(lambda loss, mask: loss.sum()),
    "over the length": lambda model, scores, labels: of_tokens(scores, labels).sum() / labels.shape[1],
    "over a number": lambda model, scores, labels: of_tokens(scores, labels).sum() / 40,
    "of row means": lambda model, scores, labels: of_tokens(scores, labels).mean(1).sum(),
    "of two": lambda model, scores, labels: (
        0 + of_tokens(scores, labels).sum() + F.mse_loss(scores, probabilities(labels), reduction="sum")
    ),
    "times the batch size": lambda model, scores, labels: of_tokens(scores, labels).mean() * labels.shape[0],
    "started at zero": lambda model, scores, labels: torch.zeros(()) + of_tokens(scores, labels).sum(),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_mean_over_what_counts(name: str) -> None:
    module, batch = Model(COUNTED[name]), joined()
    said, weights = shares_of(COUNTED, name)
    assert isinstance(said, Counted), said
    assert_exact(module, batch, weights.weigh([as_data(part) for part in parts_of(batch)], "step 1"))
    assert not weights.remark


@pytest.mark.parametrize("name", EQUAL)
def test_a_mean_over_samples(name: str) -> None:
    module, batch = Model(EQUAL[name]), joined()
    said, weights = shares_of(EQUAL, name)
    assert said == Equal()
    assert_exact(module, batch, weights.weigh([as_data(part) for part in parts_of(batch)], "step 1"))
    assert not weights.remark


@pytest.mark.parametrize("name", SUM)
def test_a_sum_over_samples(name: str) -> None:
    module, batch = Model(SUM[name]), joined()
    said, weights = shares_of(SUM, name)
    assert said == Sum()
    assert_exact(module, batch, weights.weigh([as_data(part) for part in parts_of(batch)], "step 1"))
    assert "added up" in weights.remark


def contrast(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
    one, other = scores.mean(1), model.second(scores).mean(1)
    return F.cross_entropy(one @ other.T, torch.arange(one.shape[0]))


def info_nce(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
    similar = scores.mean(1) @ model.second(scores).mean(1).T
    return (similar.logsumexp(1) - similar.diagonal()).mean()


def of_experts(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
    chosen = F.one_hot(scores.argmax(-1), CLASSES).float().mean((0, 1))
    return entropy(ignore_index=0)(model, scores, labels) + (chosen * scores.softmax(-1).mean((0, 1))).sum()


UNKNOWN: dict[str, tuple[Loss, str]] = {
    "a root of a mean": (
        lambda model, scores, labels: F.mse_loss(scores, probabilities(labels)).sqrt(),
        "puts values of a whole microbatch through aten.sqrt.default in the model itself",
    ),
    "the log of a mean": (lambda model, scores, labels: scores.exp().mean().log(), "aten.log.default"),
    "two numbers of labels": (
        lambda model, scores, labels: (
            entropy(ignore_index=0)(model, scores, labels) + entropy(ignore_index=1)(model, scores, labels)
        ),
        "adds terms that count different labels or samples",
    ),
    "labels and samples": (
        lambda model, scores, labels: entropy()(model, scores, labels) + scores.square().mean(),
        "adds terms that count different labels or samples",
    ),
    "a sum and a mean": (
        lambda model, scores, labels: of_tokens(scores, labels).sum() + scores.square().mean(),
        "adds terms that count different labels or samples",
    ),
    "a sum and a penalty": (
        lambda model, scores, labels: of_tokens(scores, labels).sum() + model.head.weight.square().sum(),
        "adds a sum over samples and a term that depends on no sample",
    ),
    "experts": (of_experts, "multiplies by a value that is taken over a whole microbatch"),
    "trained class weights": (
        lambda model, scores, labels: F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), weight=model.trained_weights.detach()
        ),
        "weighs classes by values that are trained or computed",
    ),
    "class weights of the batch": (
        lambda model, scores, labels: F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), weight=F.one_hot(labels, CLASSES).float().mean((0, 1))
        ),
        "weighs classes by what depends on the batch",
    ),
    "labels of the model": (
        lambda model, scores, labels: F.cross_entropy(scores.flatten(0, 1), model.second(scores).argmax(-1).flatten()),
        "has labels that the model computes",
    ),
    "a number from the model": (
        lambda model, scores, labels: of_tokens(scores, labels).sum() / scores.sigmoid().sum(),
        "divides by a value that the model computes over a whole microbatch",
    ),
    "numbers by position": (
        masked_mean(lambda loss, mask: (loss.sum(0) / mask.sum(0).clamp(min=1)).mean()),
        "puts values of a whole microbatch through aten.clamp.default",
    ),
    "contrast": (contrast, "compares or joins samples of a microbatch with one another (aten.matmul"),
    "contrast by hand": (info_nce, "compares or joins samples of a microbatch with one another (aten.matmul"),
    "a shape that was meant otherwise": (
        lambda model, scores, labels: F.mse_loss(scores[:, :1, 0], labels[:, 0].float()),
        "compares or joins samples of a microbatch with one another (aten.expand",
    ),
    "a softmax over samples": (
        lambda model, scores, labels: (scores.mean((1, 2)).softmax(0) * labels[:, 0]).sum(),
        "mixes the samples of a microbatch (aten.softmax.int",
    ),
    "mixed with the sample opposite": (
        lambda model, scores, labels: (scores - 0.3 * scores.flip(0)).square().mean(),
        "mixes the samples of a microbatch (aten.flip",
    ),
    "one sample": (
        lambda model, scores, labels: of_tokens(scores, labels)[0].mean(),
        "picks single samples of a microbatch",
    ),
    "the worst token": (lambda model, scores, labels: of_tokens(scores, labels).max(), "aten.max.default"),
    "a normalised row": (
        lambda model, scores, labels: (scores.mean(1) - scores.mean((0, 1))).abs().sum(),
        "over a whole microbatch",
    ),
    "weights of tokens by the model": (
        lambda model, scores, labels: (of_tokens(scores, labels) / of_tokens(scores, labels).mean()).square().mean(),
        "over a whole microbatch",
    ),
}


TOLD = {name: loss for name, (loss, _) in UNKNOWN.items()}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_counts_alike_and_is_said(name: str) -> None:
    said, weights = shares_of(TOLD, name)
    reason = UNKNOWN[name][1]
    assert isinstance(said, Equal)
    assert reason in said.reason
    assert said.reason in weights.remark
    assert weights.weigh([{}, {}], "step 1") == (0.5, 0.5)


def test_a_buffer_that_changes_has_no_part_in_counting() -> None:
    def loss(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
        model.seen.add_(1)
        return of_tokens(scores, labels).sum() / model.seen

    said, _ = shares(captured(Model(loss), joined()))
    assert isinstance(said, Equal)
    assert "depends on the buffer 'seen', which changes in training" in said.reason


def test_an_input_without_samples_is_named() -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor, number: Tensor) -> Tensor:
            return self.layer(x).square().sum() / number

    found = capture(Divided(), {"x": torch.ones(2, 3), "number": torch.tensor(8.0)}, validate_values=False)
    assert loss_shares(found.graph) == Equal("depends on the input 'number', which has no axis of samples")


def test_every_loss_with_a_reduction_has_a_rule() -> None:
    reducing = {name for name, traits in VOCABULARY.items() if "reduction" in traits.by_name}
    assert reducing == CLASSIFICATION | ELEMENTWISE_LOSSES


# --- nothing counts -----------------------------------------------------------------------------------------------


def test_a_microbatch_without_labels_has_no_share_and_a_batch_without_them_is_named() -> None:
    batch = joined()
    batch["labels"][:ROWS] = 0
    for name in ("ignored", "class weights", "masked mean"):
        module = Model(COUNTED[name])
        _, weights = shares_of(COUNTED, name)
        found = weights.weigh([as_data(part) for part in parts_of(batch)], "step 1")
        assert found[0] == 0
        assert sum(found) == pytest.approx(1)
        assert_exact(module, batch, found)
        empty = as_data({**parts_of(batch)[0]})
        with pytest.raises(DataError, match=r"nothing counts in the loss of step 7: .* 0 over all 2 microbatches"):
            weights.weigh([empty, empty], "step 7")


def test_a_denominator_with_a_least_value_needs_no_labels() -> None:
    """What plain torch gives for such a batch is 0, and here it is too."""
    batch = joined()
    batch["labels"][ROWS:] = 0
    module = Model(COUNTED["masked mean, clamped"])
    _, weights = shares_of(COUNTED, "masked mean, clamped")
    assert_exact(module, batch, weights.weigh([as_data(part) for part in parts_of(batch)], "step 1"))
    batch["labels"][:] = 0
    assert_exact(module, batch, weights.weigh([as_data(part) for part in parts_of(batch)], "step 1"))


def penalised(least: float) -> Loss:
    def loss(model: Model, scores: Tensor, labels: Tensor) -> Tensor:
        mean = masked_mean(lambda loss, mask: loss.sum() / mask.sum().clamp(min=least))
        return mean(model, scores, labels) + model.head.weight.square().sum()

    return loss


def test_a_penalty_counts_once_however_many_microbatches_are_empty() -> None:
    batch = joined()
    batch["labels"][:ROWS] = 0
    module = Model(penalised(1))
    _, weights = shares(captured(module, batch))
    found = weights.weigh([as_data(part) for part in parts_of(batch)], "step 1")
    assert found[0] == 0
    assert_exact(module, batch, found)
    _, weights = shares(captured(Model(penalised(100)), batch))
    with pytest.raises(DataError, match=r"the loss of step 1 adds a term .* add up to 2.0000, not to 1; set training"):
        weights.weigh([as_data(part) for part in parts_of(batch)], "step 1")


# --- a choice by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two numbers of labels", "a root of a mean"])
def test_a_choice_by_hand(name: str) -> None:
    batch = joined()
    parts = [as_data(part) for part in parts_of(batch)]
    said, weights = shares_of(TOLD, name, "equal")
    assert said == Equal()
    assert weights.weigh(parts, "step 1") == (1 / 3,) * 3
    assert weights.remark == 'each microbatch counts alike, as training.loss_share = "equal" says'
    _, weights = shares_of(TOLD, name, "labels")
    labels = [part["labels"] for part in parts_of(batch)]
    if name == "two numbers of labels":
        counts = [int((each != 0).sum() + (each != 1).sum()) for each in labels]
    else:
        counts = [each.numel() for each in labels]  # the loss ignores none, and none is -100
    assert weights.weigh(parts, "step 1") == pytest.approx([count / sum(counts) for count in counts])
    assert "by their labels" in weights.remark


def test_labels_that_do_not_exist_cannot_be_counted() -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.mse_loss(self.layer(x), labels)

    found = capture(Regression(), {"x": torch.ones(2, 3), "labels": torch.ones(2, 1)}, validate_values=False)
    with pytest.raises(ConfigError, match="no input of int64 labels"):
        loss_shares(found.graph, "labels")
    assert loss_shares(found.graph) == Equal()


def test_microbatches_of_one_step_have_one_shape() -> None:
    _, weights = shares_of(COUNTED, "ignored")
    batch = joined()
    parts = [batch, {name: tensor[:1] for name, tensor in batch.items()}]
    with pytest.raises(DataError, match="the microbatches of step 2 must all have one shape"):
        weights.weigh([as_data(part) for part in parts], "step 2")


def test_the_weight_of_an_l1_loss_is_not_lost_in_the_trace() -> None:
    """torch itself loses it while it traces. The capture compares the losses of graph and module, at padded labels."""
    found = capture(Model(COUNTED["l1, weighed"]), parts_of(joined())[1], validate_values=True)
    assert "aten.l1_loss.default" not in {node.op for node in found.graph.nodes}


@pytest.mark.parametrize("kind", ["einsum", "matmul", "filled"])
def test_a_count_is_not_forgotten_in_a_product(kind: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 9)

        def forward(self, x: Tensor, labels: Tensor, m: Tensor) -> Tensor:
            logits = self.layer(x).flatten(0, 1)
            per = nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)
            if kind == "einsum":
                return torch.einsum("bt,bt->b", per, m / m.sum()).sum()
            if kind == "matmul":
                return ((per * m / m.sum()) @ torch.ones(5)).sum()
            return (per.sum(1) / torch.full((per.shape[0],), per.shape[0])).sum()

    example = {"x": torch.randn(2, 5, 4), "labels": torch.randint(0, 9, (2, 5)), "m": torch.ones(2, 5)}
    found = loss_shares(capture(Masked(), example, dynamic={name: {0: "batch"} for name in example}).graph)
    assert isinstance(found, Equal)
    assert "divide" in found.reason
