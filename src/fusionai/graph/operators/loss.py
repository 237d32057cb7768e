"""Losses."""

from __future__ import annotations

from fusionai.graph.operators.schema import ConcreteCall, define


def _one_like_input(call: ConcreteCall) -> int:
    """Return the bytes of one number for each element: log-probabilities or differences, and their gradient."""
    return call.tensor("self").nbytes


def _both_normalised(call: ConcreteCall) -> int:
    return call.tensor("x1").nbytes + call.tensor("x2").nbytes


_CROSS_ENTROPY = (
    "aten.cross_entropy_loss.default(self: tensor, target: tensor, weight: tensor? = none, reduction: int = 1, "
    "ignore_index: int = -100, label_smoothing: float = 0.0)"
)
_CROSS_ENTROPY_TAIL = "weight: tensor? = none, reduction: int = 1, ignore_index: int = -100"

OPERATORS = (
    *define(
        _CROSS_ENTROPY,
        "normalisation",
        saves=("target", "weight"),
        extra=_one_like_input,
        backward_workspace=_one_like_input,
    ),
    *define(
        f"""
        aten.nll_loss.default(self: tensor, target: tensor, {_CROSS_ENTROPY_TAIL})
        aten.nll_loss_nd.default(self: tensor, target: tensor, {_CROSS_ENTROPY_TAIL})
        """,
        "reduction",
        saves=("self", "target", "weight"),
    ),
    *define(
        """
        aten.mse_loss.default(self: tensor, target: tensor, reduction: int = 1)
        aten.smooth_l1_loss.default(self: tensor, target: tensor, reduction: int = 1, beta: float = 1.0)
        aten.huber_loss.default(self: tensor, target: tensor, reduction: int = 1, delta: float = 1.0)
        aten.soft_margin_loss.default(self: tensor, target: tensor, reduction: int = 1)
        """,
        "reduction",
        saves=("self", "target"),
    ),
    *define(
        "aten.l1_loss.default(self: tensor, target: tensor, reduction: int = 1)",
        "reduction",
        extra=_one_like_input,
    ),
    *define(
        "aten.binary_cross_entropy.default(self: tensor, target: tensor, weight: tensor? = none, reduction: int = 1)",
        "reduction",
        saves=("self", "target", "weight"),
    ),
    *define(
        "aten.binary_cross_entropy_with_logits.default(self: tensor, target: tensor, weight: tensor? = none, "
        "pos_weight: tensor? = none, reduction: int = 1)",
        "reduction",
        saves=("self", "target", "weight", "pos_weight"),
    ),
    *define(
        "aten.kl_div.default(self: tensor, target: tensor, reduction: int = 1, *, log_target: bool = false)",
        "reduction",
        saves=("self if target", "target"),
    ),
    *define(
        "aten.cosine_similarity.default(x1: tensor, x2: tensor, dim: int = 1, eps: float = 1e-08)",
        "reduction",
        saves=("x1", "x2", "output"),
        extra=_both_normalised,
    ),
)
