"""Keeps an argument that torch loses while a model is traced.

While a trace listens, `torch.nn.functional.l1_loss` hands itself on without its `weight` (torch 2.13 and before). The
trace would hold another loss than the model's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional


@contextmanager
def keeping_arguments() -> Iterator[None]:
    """Have `l1_loss` keep its weight, however the model has imported it."""
    hand_on: Callable[..., Any] = functional.__dict__["handle_torch_function"]

    def kept(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is functional.l1_loss and "weight" not in kwargs:
            weight = sys._getframe(1).f_locals.get("weight")
            if weight is not None:
                kwargs["weight"] = weight
        return hand_on(function, *args, **kwargs)

    functional.__dict__["handle_torch_function"] = kept
    try:
        yield
    finally:
        functional.__dict__["handle_torch_function"] = hand_on
