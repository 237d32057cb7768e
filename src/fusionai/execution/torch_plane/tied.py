"""Gradients of weights that several stages of one program share.

For each microbatch, a single process adds the gradients of all uses of a weight, and then adds that sum to the sum of
earlier microbatches. A pipeline runs other microbatches in between, so it would add in another order. Floating-point
addition depends on the order, and AdamW turns rounding into whole steps where a gradient is zero except for rounding.
So a stage's share of a microbatch's gradient waits here until all stages of the program have given their shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusionai.execution.program import MicrobatchKey
from fusionai.graph.model import SubDag, WeightKey
from fusionai.graph.shared_weights import MOST_WAITING_BYTES


@dataclass(slots=True)
class _Share:
    gradient: Tensor | None
    stages: int


class TiedGradientShares:
    """Collects the shares of each microbatch's gradient of each tied weight."""

    def __init__(self, subdags: Sequence[SubDag]) -> None:
        stages = Counter(key for subdag in subdags for key in {weight.key for weight in subdag.weights})
        self._stages = {key: count for key, count in stages.items() if count > 1}
        self._keys = {
            subdag.index: tuple({weight.key: None for weight in subdag.weights if weight.key in self._stages})
            for subdag in subdags
        }
        self._waiting: dict[tuple[WeightKey, MicrobatchKey], _Share] = {}

    def keys(self, stage: int) -> tuple[WeightKey, ...]:
        """Return the weights of a stage that other stages of the program use too."""
        return self._keys[stage]

    def add(
        self, key: WeightKey, microbatch: MicrobatchKey, gradient: Tensor | None, before: Tensor | None
    ) -> Tensor | None:
        """Take one stage's share. Return the weight's accumulated gradient: `before`, as long as shares are missing."""
        share = self._waiting.pop((key, microbatch), None)
        share = _Share(gradient, 1) if share is None else _Share(_sum(share.gradient, gradient), share.stages + 1)
        if share.stages < self._stages[key] and self._fits(share.gradient):
            self._waiting[key, microbatch] = share
            return before
        return _sum(before, share.gradient)

    def flush(self, key: WeightKey, before: Tensor | None) -> Tensor | None:
        """Return the accumulated gradient with every waiting share of a weight added."""
        for waiting in [item for item in self._waiting if item[0] == key]:
            before = _sum(before, self._waiting.pop(waiting).gradient)
        return before

    def tensors(self) -> list[Tensor]:
        """Return the gradients that wait."""
        return [share.gradient for share in self._waiting.values() if share.gradient is not None]

    def clear(self) -> None:
        """Forget every share."""
        self._waiting.clear()

    def _fits(self, gradient: Tensor | None) -> bool:
        return sum(item.nbytes for item in self.tensors()) + (gradient.nbytes if gradient is not None else 0) <= (
            MOST_WAITING_BYTES
        )


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Add the second to the first, in the first's memory."""
    if first is None or second is None:
        return second if first is None else first
    return first.add_(second)
