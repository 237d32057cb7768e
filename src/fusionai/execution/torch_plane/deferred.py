"""Linear layers whose weight's gradient is computed after the boundary gradients have been handed out.

Nothing in backward waits for the gradient of a weight, but a neighbour waits for the boundary gradients. So the
backward of a linear layer computes only the gradient of its input, and keeps the two factors of its weight's gradient.
The products are computed once the boundary gradients have been handed out. Zero-bubble schedules split the backward
pass in the same way (Qi et al., arXiv 2401.10241); here the split stays within one turn of 1F1B.

The results equal torch's bit for bit: the same products are added to the accumulated gradients in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fusionai.execution.torch_plane.tensors import storage_address, storage_bytes
from fusionai.graph.activation_memory import MOST_DEFERRED_BYTES

# Shapes: N = rows (all leading axes together), I = inputs, O = outputs


@dataclass(frozen=True, slots=True)
class _Product:
    weight: Tensor
    gradient_NO: Tensor
    input_NI: Tensor

    def add(self) -> None:
        """Add the weight's gradient of one microbatch to what has accumulated, as torch does."""
        made_OI = torch.mm(self.gradient_NO.t(), self.input_NI).to(self.weight.dtype)
        if self.weight.grad is None:
            self.weight.grad = made_OI
        else:
            self.weight.grad.add_(made_OI)


class DeferredProducts:
    """The products that wait. At most `MOST_DEFERRED_BYTES` of tensors are kept for them."""

    def __init__(self) -> None:
        self._waiting: list[_Product] = []
        self._held: dict[int, int] = {}
        """Bytes by storage, because layers side by side share an input."""

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `aten.linear`. The gradient of `weight`, which must be a leaf, is left to `flush`."""
        plain_bias = bias is None or bias.shape == weight.shape[:1]
        if weight.dim() != 2 or not plain_bias or not input.is_contiguous():
            # In these cases torch multiplies and adds in another order, so results would not be equal bit for bit.
            return cast("Tensor", torch.ops.aten.linear.default(input, weight, bias))
        used = weight
        if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(input.device.type)
            input, used = input.to(dtype), weight.detach().to(dtype)
            bias = bias.to(dtype) if bias is not None else None
        return cast("Tensor", _Linear.apply(self, weight, used, input, bias))  # type: ignore[no-untyped-call]

    def add(self, product: _Product) -> None:
        """Keep a product for later, or compute it at once when too much is kept."""
        tensors = (product.gradient_NO, product.input_NI)
        more = {storage_address(each): storage_bytes(each) for each in tensors}
        if sum({**self._held, **more}.values()) > MOST_DEFERRED_BYTES:
            product.add()
            return
        self._held |= more
        self._waiting.append(product)

    def flush(self) -> None:
        """Compute every product that waits."""
        if not self._waiting:
            return
        with torch.no_grad():
            products, self._waiting = self._waiting, []
            self._held.clear()
            products.reverse()
            while products:
                products.pop().add()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that are kept."""
        for product in self._waiting:
            yield product.gradient_NO
            yield product.input_NI

    def clear(self) -> None:
        """Forget every product that waits."""
        self._waiting.clear()
        self._held.clear()


class _Linear(torch.autograd.Function):
    """`aten.linear` whose backward leaves the weight's gradient to a `DeferredProducts`."""

    @staticmethod
    def forward(
        ctx: Any, products: DeferredProducts, weight: Tensor, used: Tensor, input: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.products, ctx.weight = products, weight
        ctx.save_for_backward(input, used)
        return cast("Tensor", torch.ops.aten.linear.default(input, used, bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        input, used = ctx.saved_tensors
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        ctx.products.add(_Product(ctx.weight, gradient_NO, input.reshape(-1, input.shape[-1])))
        back = torch.mm(gradient_NO, used).view(input.shape) if ctx.needs_input_grad[3] else None
        back_bias = gradient_NO.sum(0) if ctx.needs_input_grad[4] else None
        return None, None, None, back, back_bias
