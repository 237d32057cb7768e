"""The functions that a program calls for its stages: built for given sizes, kept for reuse, compiled where asked."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fusionai.errors import JobError
from fusionai.execution.plane import ProgramOptions
from fusionai.execution.program import MicrobatchKey
from fusionai.execution.torch_plane.build import StageFunction, mutated_keys, specialise
from fusionai.execution.torch_plane.compiling import StageCall, compiled
from fusionai.execution.torch_plane.randomness import random_seed, seeded
from fusionai.execution.torch_plane.tied import TiedGradientShares
from fusionai.execution.torch_plane.weights import Weights
from fusionai.graph.dependencies import deferrable, reads
from fusionai.graph.evaluation import face
from fusionai.graph.model import Sizes, SubDag, WeightKey

_FUNCTIONS_KEPT = 8
"""Stage functions that are kept. A stage needs one for each set of sizes, and training and evaluation have their own.
With fewer, a job with many sizes rebuilds functions; more of them keep more memory for their fixed values."""


@dataclass(slots=True)
class ReadyFunction:
    """A stage function and how it is called."""

    function: StageFunction
    call: StageCall | None = None
    """None until the first call, which compiles the function where the job asks for it."""


class StageFunctions:
    """Builds, keeps and calls the functions of one program's stages.

    Args:
        subdags: all stages of the program. A buffer that one of them writes to is a fixed value in none.
        options: precision, compilation and seed.
        weights: the program's weights. Functions depend on their values, so call `clear` after a load.
        tied: the weights that stages share. Their gradients are never deferred.
        linear: replaces a linear call whose weight's gradient is deferred.
    """

    def __init__(
        self,
        subdags: Sequence[SubDag],
        options: ProgramOptions,
        weights: Weights,
        device: torch.device,
        *,
        tied: TiedGradientShares,
        linear: Callable[..., Tensor],
    ) -> None:
        self._options = options
        self._weights = weights
        self._device = device
        self._mutable = frozenset[WeightKey]().union(*(mutated_keys(subdag) for subdag in subdags))
        self._tied = tied
        self._linear = linear
        self._functions: OrderedDict[tuple[object, ...], ReadyFunction] = OrderedDict()

    def ready(self, subdag: SubDag, sizes: Sizes, train: bool) -> ReadyFunction:
        """Return the stage's function for these sizes; build it if it is not kept.

        Raises JobError while weights are missing, GraphError as `specialise`.
        """
        missing = self._weights.missing()
        if missing:
            raise JobError(f"{len(missing)} weights of this program are not loaded, the first is {missing[0]!r}")
        key = (subdag.index, train, *sorted(sizes.items()))
        ready = self._functions.get(key)
        if ready is None:
            part = face(subdag, train)
            function = specialise(
                part,
                sizes,
                self._weights.tensors,
                mutable=self._mutable,
                train=train or part is not subdag,  # what was captured for evaluation runs as it stands
                device=self._device,
                deferred=self._deferred_calls(subdag) if train else frozenset(),
                linear=self._linear,
            )
            ready = self._functions[key] = ReadyFunction(function)
            if len(self._functions) > _FUNCTIONS_KEPT:
                self._functions.popitem(last=False)
        self._functions.move_to_end(key)
        return ready

    def run(
        self,
        ready: ReadyFunction,
        arguments: tuple[Tensor, ...],
        stage: int,
        microbatch: MicrobatchKey,
        train: bool,
    ) -> tuple[Tensor, ...]:
        """Call a stage's function for one microbatch, in the job's precision and with the microbatch's seed."""
        bf16 = self._options.precision == "bf16"
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(train))
            if bf16:
                stack.enter_context(torch.autocast(self._device.type, dtype=torch.bfloat16))
            if ready.function.random:
                seed = random_seed(self._options.seed, microbatch, stage)
                stack.enter_context(seeded(seed, self._device))
            if ready.call is None:
                if self._options.compile:
                    ready.call = compiled(ready.function, arguments, train=train, stage=stage)
                    if ready.function.random:
                        stack.enter_context(seeded(seed, self._device))
                else:
                    ready.call = cast("StageCall", ready.function.module.forward)
            return ready.call(*arguments)

    def tensors(self) -> Iterator[Tensor]:
        """Return the tensors that the functions hold besides the weights."""
        for ready in self._functions.values():
            yield from ready.function.fixed

    def clear(self) -> None:
        """Forget all functions."""
        self._functions.clear()

    def _deferred_calls(self, subdag: SubDag) -> frozenset[str]:
        """Return the names of linear calls whose weight's gradient is left to `finish_backward`."""
        if self._options.compile:
            return frozenset()  # a compiled backward is one piece
        tied = {weight.name for weight in subdag.weights if weight.key in self._tied.keys(subdag.index)}
        nodes = {node.name: node for node in subdag.nodes}
        return frozenset(name for name in deferrable(subdag) if tied.isdisjoint(reads(nodes[name])))
