"""Matrix products of token groups with one expert's weight each, for mixture-of-experts layers.

Shapes: S tokens sorted by expert, D and E input and output size, X experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def grouped_matmul(tokens_SD: Tensor, weights_XDE: Tensor, ends_X: Tensor) -> Tensor:
    """Return (S, E): the rows up to an expert's end in `ends_X` times its weight. Rows after the last end are 0."""
    result: Tensor = _GroupedMatmul.apply(tokens_SD, weights_XDE, ends_X)  # type: ignore[no-untyped-call]
    return result


class _GroupedMatmul(torch.autograd.Function):
    """One node of the autograd graph, so that weights of experts without tokens get zero gradients cheaply."""

    @staticmethod
    def forward(ctx: Any, tokens_SD: Tensor, weights_XDE: Tensor, ends_X: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_SD, weights_XDE)
        ctx.ends = ends_X.tolist()
        result_SE = tokens_SD.new_zeros(tokens_SD.shape[0], weights_XDE.shape[2])
        for expert, start, end in _groups(ctx.ends):
            torch.mm(tokens_SD[start:end], weights_XDE[expert], out=result_SE[start:end])
        return result_SE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        tokens_SD, weights_XDE = ctx.saved_tensors
        (gradient_SE,) = gradients
        need_tokens, need_weights, _ = ctx.needs_input_grad
        for_tokens_SD = torch.zeros_like(tokens_SD) if need_tokens else None
        for_weights_XDE = torch.zeros_like(weights_XDE) if need_weights else None
        for expert, start, end in _groups(ctx.ends):
            gradient = gradient_SE[start:end]
            if for_tokens_SD is not None:
                torch.mm(gradient, weights_XDE[expert].T, out=for_tokens_SD[start:end])
            if for_weights_XDE is not None:
                torch.mm(tokens_SD[start:end].T, gradient, out=for_weights_XDE[expert])
        return for_tokens_SD, for_weights_XDE, None


def _groups(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, start, end) of the experts that have tokens."""
    start = 0
    for expert, end in enumerate(ends):
        if start != end:
            yield expert, start, end
        start = end
