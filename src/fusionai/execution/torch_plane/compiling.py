"""`torch.compile` of a stage, with eager execution where it does not work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from fusionai.execution.torch_plane.build import StageFunction

log = logging.getLogger(__name__)

StageCall = Callable[..., tuple[Tensor, ...]]


def compiled(function: StageFunction, arguments: Sequence[Tensor], *, train: bool, stage: int) -> StageCall:
    """Return a compiled form of a stage, or its eager form when compilation fails.

    torch compiles the forward pass at the first call, and the backward pass at the first backward. Both calls are made
    here, so that compilation cannot fail in the middle of a step. Buffers that the stage writes to are copied for them.
    """
    eager = cast("StageCall", function.module.forward)
    try:
        call = torch.compile(function.module, dynamic=False)
        first_weight = len(function.feeds)
        trial = list(arguments)
        for position, key in enumerate(function.weights, start=first_weight):
            if key in function.mutated:
                trial[position] = arguments[position].clone()
        with torch.set_grad_enabled(train):
            outputs = call(*trial)
        roots = [output for output in outputs if output.requires_grad]
        leaves = [argument for argument in trial if argument.requires_grad]
        if train and roots and leaves:
            torch.autograd.grad(roots, leaves, [torch.ones_like(root) for root in roots], allow_unused=True)
    except Exception as error:
        # A compiler and its toolchain can fail in many ways. The job can run without them.
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else ""
        log.warning("stage %d is not compiled and runs eagerly: %s: %s", stage, type(error).__name__, reason)
        return eager
    return cast("StageCall", call)
