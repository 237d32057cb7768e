"""AdamW and SGD with state that can be read and loaded by weight.

The arithmetic is the same as in `torch.optim`'s default form, operator by operator, so that a job's weights equal a
plain loop's weights bit for bit. torch's fused AdamW rounds differently: where a gradient is zero except for rounding,
as the gradient of a key bias is, AdamW turns the difference into a whole step. On the CPU the optimizer works block by
block, so that a block passes through memory once, not once for each operator (figures: docs/decisions/0006).
Accelerators use torch's fused form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.model import WeightKey

_BLOCK_ELEMENTS = 1 << 18
"""Elements of a block; four such blocks of fp32 take 4 MiB. Of the sizes 2^14 to 2^18 this one was the fastest or close
to it, with one thread and with two. Blocks that do not fit into the cache make the update slower, not wrong."""


class Optimizer:
    """Updates weights from their `.grad`. As in torch, weights without a gradient do not change."""

    def __init__(self, config: OptimizerConfig, device: torch.device, *, fused: bool | None = None) -> None:
        """Use torch's fused form if `fused` says so; None: on accelerators, whose launches cost more than memory."""
        self._config = config
        self._device = device
        self._fused = device.type != "cpu" if fused is None else fused
        self._states: dict[WeightKey, dict[str, Tensor]] = {}
        self._steps: dict[WeightKey, int] = {}
        self._first_step = 0
        self.step = 0
        """Updates applied so far."""

    def continue_from(self, step: int) -> None:
        """Continue counting updates from `step`, for every weight."""
        self.step = self._first_step = step
        self._steps.clear()

    def state(self, key: WeightKey, name: str) -> Tensor | None:
        """Return a weight's state, or None as long as there is none."""
        return self._states.get(key, {}).get(name)

    def load_state(self, key: WeightKey, name: str, weight: Tensor, value: Tensor) -> None:
        """Set one state of a weight."""
        self._state(key, weight)[name].copy_(value)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every state tensor."""
        for states in self._states.values():
            yield from states.values()

    def clear(self) -> None:
        """Forget every state."""
        self._states.clear()

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[WeightKey, Tensor]], learning_rate: float, gradient_scale: float) -> None:
        """Apply one update with the weights' gradients times `gradient_scale`. It overwrites the gradients."""
        self.step += 1
        due = [(key, weight) for key, weight in weights if weight.grad is not None]
        for key, _ in due:
            self._steps[key] = self._steps.get(key, self._first_step) + 1
        if self._fused:
            self._update_fused(due, learning_rate, gradient_scale)
            return
        for key, weight in due:
            for block in _blocks(weight, self._state(key, weight)):
                if gradient_scale != 1:
                    block["gradient"].mul_(gradient_scale)
                if self._config.kind == "adamw":
                    self._adamw(block, learning_rate, self._steps[key])
                else:
                    self._sgd(block, learning_rate)

    def _state(self, key: WeightKey, weight: Tensor) -> dict[str, Tensor]:
        if key not in self._states:
            self._states[key] = {
                name: torch.zeros_like(weight, requires_grad=False, memory_format=torch.contiguous_format)
                for name in self._config.states
            }
        return self._states[key]

    def _adamw(self, block: dict[str, Tensor], learning_rate: float, step: int) -> None:
        config, weight, gradient = self._config, block["weight"], block["gradient"]
        mean, square = block["exp_avg"], block["exp_avg_sq"]
        if config.weight_decay:
            weight.mul_(1 - learning_rate * config.weight_decay)
        mean.lerp_(gradient, 1 - config.beta1)
        square.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        # The gradient is not needed any more, so its memory holds the denominator.
        scale = math.sqrt(1 - config.beta2**step)
        torch.sqrt(square, out=gradient).div_(scale).add_(config.epsilon)
        weight.addcdiv_(mean, gradient, value=-learning_rate / (1 - config.beta1**step))

    def _sgd(self, block: dict[str, Tensor], learning_rate: float) -> None:
        config, weight, gradient = self._config, block["weight"], block["gradient"]
        if config.weight_decay:
            gradient.add_(weight, alpha=config.weight_decay)
        if config.momentum:
            gradient = block["momentum_buffer"].mul_(config.momentum).add_(gradient)
        weight.add_(gradient, alpha=-learning_rate)

    def _update_fused(self, due: list[tuple[WeightKey, Tensor]], learning_rate: float, gradient_scale: float) -> None:
        if not due:
            return
        config, weights = self._config, [weight for _, weight in due]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        states = [self._state(key, weight) for key, weight in due]
        if gradient_scale != 1:
            torch._foreach_mul_(gradients, gradient_scale)
        if config.kind == "adamw":
            before = torch.tensor([self._steps[key] - 1.0 for key, _ in due], device=self._device)
            adamw(
                weights,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                list(before.unbind()),
                fused=True,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=learning_rate,
                weight_decay=config.weight_decay,
                eps=config.epsilon,
                maximize=False,
            )
        else:
            sgd(
                weights,
                gradients,
                [state.get("momentum_buffer") for state in states],
                fused=True,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                lr=learning_rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


def _blocks(weight: Tensor, states: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a weight with its gradient and state, block by block, as views that may be written to."""
    assert weight.grad is not None
    tensors = {"weight": weight.detach(), "gradient": weight.grad, **states}
    flat = {name: tensor.view(-1) for name, tensor in tensors.items()}
    for start in range(0, weight.numel(), _BLOCK_ELEMENTS):
        yield {name: tensor[start : start + _BLOCK_ELEMENTS] for name, tensor in flat.items()}
