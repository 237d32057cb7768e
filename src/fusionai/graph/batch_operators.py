"""Operators by what they do to the samples of a batch; see `batch_analysis`."""

from __future__ import annotations

NO_REDUCTION, MEAN = 0, 1
"""torch's numbers of reductions; 2 is the sum."""

CLASSIFICATION = frozenset({"aten.cross_entropy_loss.default", "aten.nll_loss.default", "aten.nll_loss_nd.default"})

ELEMENTWISE_LOSSES = frozenset(
    {
        "aten.mse_loss.default",
        "aten.smooth_l1_loss.default",
        "aten.huber_loss.default",
        "aten.soft_margin_loss.default",
        "aten.l1_loss.default",
        "aten.binary_cross_entropy.default",
        "aten.binary_cross_entropy_with_logits.default",
        "aten.kl_div.default",
    }
)
"""Losses whose mean is taken over all elements."""

COPIES = frozenset(
    {
        "aten.clone.default",
        "aten.lift_fresh_copy.default",
        "aten._to_copy.default",
        "aten.neg.default",
        "aten.flip.default",
        "aten.repeat.default",
    }
)
"""Operators besides views that only move, repeat or negate elements."""

SUMS = frozenset({"aten.sum.default", "aten.sum.dim_IntList"})
MEANS = frozenset({"aten.mean.default", "aten.mean.dim"})
ADDITIONS = frozenset(f"aten.{name}.{kind}" for name in ("add", "sub", "rsub") for kind in ("Tensor", "Scalar"))
JOINS = frozenset({"aten.cat.default", "aten.stack.default", "aten.hstack.default", "aten.vstack.default"})
ZEROS = frozenset({"aten.zeros.default"})

NUMBERING = frozenset(
    {"aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.linspace.default", "aten.eye.default"}
)
"""Creating operators whose result along an axis of samples is not the same for every microbatch."""


ALONG_AN_AXIS = frozenset(
    {
        *("aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default", "aten._log_softmax.default"),
        *("aten.cumsum.default", "aten.cumprod.default"),
        *("aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.topk.default"),
        *("aten.flip.default", "aten.roll.default"),
    }
)
"""Operators that keep an axis, and whose results depend on all or other elements along it."""
