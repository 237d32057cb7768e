"""A program of the torch plane: the stages that one compnode runs for one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionai.errors import GraphError, JobError
from fusionai.execution.plane import ProgramOptions
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.execution.torch_plane.crossing import backward_starts, feeds
from fusionai.execution.torch_plane.deferred import DeferredProducts
from fusionai.execution.torch_plane.devices import apply_threads, release_cached_memory, torch_device
from fusionai.execution.torch_plane.optimizers import Optimizer
from fusionai.execution.torch_plane.retained import distinct_bytes, saved_tensors
from fusionai.execution.torch_plane.stage_functions import StageFunctions
from fusionai.execution.torch_plane.tensors import from_data, storage_address, to_data
from fusionai.execution.torch_plane.tied import TiedGradientShares
from fusionai.execution.torch_plane.weights import Weights
from fusionai.graph.evaluation import face
from fusionai.graph.model import Sizes, SubDag, ValueName, WeightKey
from fusionai.tensor import TensorData


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the forward of a microbatch keeps for its backward."""

    leaves: dict[ValueName, Tensor]
    roots: dict[ValueName, Tensor]


class TorchProgram(RoundProgram):
    """Runs sub-DAGs with torch's autograd.

    In bf16, boundary tensors and gradients cross in the dtype that autocast gives them, so that the receiving
    stage continues exactly as one process would: a tensor declared float32 may come as bfloat16.
    """

    def __init__(self, subdags: Sequence[SubDag], options: ProgramOptions) -> None:
        self._device = torch_device(options.device)
        self._options = options
        self._subdags = {subdag.index: subdag for subdag in subdags}
        if len(self._subdags) != len(subdags):
            raise GraphError(f"two stages have one index: {[subdag.index for subdag in subdags]}")
        self._weights = Weights(subdags, self._device)
        self._optimizer = Optimizer(options.optimizer, self._device)
        self._tied = TiedGradientShares(subdags)
        self._deferred = DeferredProducts()
        self._functions = StageFunctions(
            subdags, options, self._weights, self._device, tied=self._tied, linear=self._deferred.linear
        )
        self._kept: dict[tuple[int, MicrobatchKey], _Kept] = {}
        self._buffers_before: dict[WeightKey, Tensor] = {}
        """Copies of buffers from before the first microbatch since the last update."""
        self._closed = False

    # --- weights -------------------------------------------------------------------------------------------

    def load(self, key: WeightKey, tensor: TensorData, state: str | None = None) -> None:
        self._check_open()
        if state is None:
            self._weights.load(key, tensor)
            self._functions.clear()  # their fixed values may depend on it
            self._buffers_before.pop(key, None)
            return
        self._weights.check(key, tensor)
        weight = self._stateful(key, state)
        self._optimizer.load_state(key, state, weight, from_data(tensor, self._device))

    def missing(self) -> tuple[WeightKey, ...]:
        return self._weights.missing()

    def keys(self) -> tuple[WeightKey, ...]:
        return self._weights.keys()

    def read(self, key: WeightKey, state: str | None = None) -> TensorData:
        self._check_open()
        if state is None:
            return to_data(self._weights.get(key), copy=True)
        weight = self._stateful(key, state)
        value = self._optimizer.state(key, state)
        return to_data(torch.zeros_like(weight, requires_grad=False) if value is None else value, copy=True)

    def optimizer_step(self) -> int:
        return self._optimizer.step

    def set_optimizer_step(self, step: int) -> None:
        self._optimizer.continue_from(step)

    def _stateful(self, key: WeightKey, state: str) -> Tensor:
        """Return a weight that has the optimizer state `state`, or raise GraphError."""
        weight = self._weights.get(key)
        known = self._options.optimizer.states if weight.requires_grad else ()
        if state not in known:
            listed = ", ".join(known) or "none"
            raise GraphError(f"weight {key!r} has no optimizer state {state!r}; it has: {listed}")
        return weight

    # --- passes --------------------------------------------------------------------------------------------

    def forward(
        self,
        stage: int,
        microbatch: MicrobatchKey,
        sizes: Sizes,
        values: Mapping[ValueName, TensorData],
        *,
        train: bool = True,
    ) -> dict[ValueName, TensorData]:
        apply_threads()
        self._deferred.flush()
        subdag = self._subdag(stage)
        if train and (stage, microbatch) in self._kept:
            raise JobError(f"{_name(stage, microbatch)} has gone forward already and waits for its backward")
        ready = self._functions.ready(subdag, sizes, train)
        function = ready.function
        fed = feeds(
            function, values, self._device, autocast=self._options.precision == "bf16", name=_name(stage, microbatch)
        )
        leaves = {}
        if train:
            for feed in function.feeds:
                if feed.gradient:
                    leaves[feed.name] = fed[feed.name].requires_grad_()
        weights = [self._weights.tensors[key] for key in function.weights]
        arguments = (*fed.values(), *weights, *function.fixed)
        if train:
            for key in function.mutated:
                if key not in self._buffers_before:
                    self._buffers_before[key] = self._weights.tensors[key].clone()
        outputs = self._functions.run(ready, arguments, stage, microbatch, train)
        loss = face(subdag, train).loss
        result = {}
        for name, output in zip(function.outputs, outputs, strict=True):
            result[name] = self._sent(output if name != loss else output.float())
        if train:
            roots = dict(zip(function.outputs, outputs, strict=True))
            self._kept[stage, microbatch] = _Kept(leaves, roots)
        return result

    def backward(
        self,
        stage: int,
        microbatch: MicrobatchKey,
        gradients: Mapping[ValueName, Sequence[TensorData]],
        loss_weight: float = 1.0,
    ) -> dict[ValueName, TensorData]:
        apply_threads()
        self._deferred.flush()
        subdag = self._subdag(stage)
        kept = self._kept.get((stage, microbatch))
        if kept is None:
            raise JobError(f"{_name(stage, microbatch)} cannot go backward: it did not go forward in training")
        roots, starts = backward_starts(
            subdag, kept.roots, gradients, loss_weight, self._device, name=_name(stage, microbatch)
        )
        del self._kept[stage, microbatch]
        tied_before: dict[WeightKey, Tensor | None] = {}
        for key in self._tied.keys(stage):
            weight = self._weights.tensors[key]
            tied_before[key], weight.grad = weight.grad, None
        fresh = [weight for _, weight in self._weights.trainable() if weight.grad is None]
        if roots:
            torch.autograd.backward(roots, starts)
        taken = {storage_address(tensor) for tensor in starts}
        result = {}
        for name, leaf in kept.leaves.items():
            gradient = torch.zeros_like(leaf, requires_grad=False) if leaf.grad is None else leaf.grad
            leaf.grad = None
            taken.add(storage_address(gradient))
            result[name] = to_data(gradient)
        _separate(fresh, taken)
        for key, before in tied_before.items():
            weight = self._weights.tensors[key]
            weight.grad = self._tied.add(key, microbatch, weight.grad, before)
        return result

    def finish_backward(self) -> None:
        apply_threads()
        self._deferred.flush()

    def discard(self, microbatch: MicrobatchKey | None = None) -> None:
        if microbatch is not None:
            self._kept = {key: kept for key, kept in self._kept.items() if key[1] != microbatch}
            return
        self._kept.clear()
        self._deferred.clear()
        self._clear_gradients()
        for key, before in self._buffers_before.items():
            self._weights.get(key).copy_(before)
        self._buffers_before.clear()

    def _sent(self, output: Tensor) -> TensorData:
        """Hand out an output; a copy where it is a weight's memory, which the next update changes."""
        return to_data(output, copy=self._weights.share_memory_with(output))

    # --- gradients and updates -----------------------------------------------------------------------------

    def gradient_norms(self, skip: Sequence[WeightKey] = ()) -> dict[WeightKey, float]:
        apply_threads()
        self._gather_gradients()
        found = {
            key: torch.linalg.vector_norm(weight.grad)
            for key, weight in self._weights.trainable()
            if weight.grad is not None and key not in skip
        }
        # One transfer from the device for all weights together.
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}

    def read_gradient(self, key: WeightKey) -> TensorData:
        weight = self._trained(key)
        self._gather_gradients()
        return to_data(torch.zeros_like(weight) if weight.grad is None else weight.grad, copy=True)

    def set_gradient(self, key: WeightKey, gradients: Sequence[TensorData]) -> None:
        weight = self._trained(key)
        if not gradients:
            raise GraphError(f"no gradients were given for weight {key!r}")
        for data in gradients:
            self._weights.check(key, data)
        total = from_data(gradients[0], self._device).clone()
        for data in gradients[1:]:
            total += from_data(data, self._device)
        self._gather_gradients()
        weight.grad = total

    def update(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        self._check_open()
        apply_threads()
        self._gather_gradients()
        self._optimizer.update(self._weights.trainable(), learning_rate, gradient_scale)
        self._clear_gradients()
        self._buffers_before.clear()

    def _gather_gradients(self) -> None:
        """Add the deferred products, and the gradients of tied weights that still wait for another stage."""
        self._deferred.flush()
        for stage in self._subdags:
            for key in self._tied.keys(stage):
                weight = self._weights.get(key)
                weight.grad = self._tied.flush(key, weight.grad)

    def _clear_gradients(self) -> None:
        self._tied.clear()
        for _, weight in self._weights.trainable():
            weight.grad = None

    def _trained(self, key: WeightKey) -> Tensor:
        weight = self._weights.get(key)
        if not weight.requires_grad:
            raise GraphError(f"weight {key!r} is not trained, so it has no gradient")
        return weight

    # --- memory --------------------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        counted: set[int] = set()
        weights = list(self._weights.tensors.values())
        total = distinct_bytes(weights, counted)
        total += distinct_bytes((weight.grad for weight in weights if weight.grad is not None), counted)
        total += distinct_bytes(self._tied.tensors(), counted)
        total += distinct_bytes(self._optimizer.tensors(), counted)
        total += distinct_bytes(self._buffers_before.values(), counted)
        total += distinct_bytes(self._deferred.tensors(), counted)
        total += distinct_bytes(self._functions.tensors(), counted)
        for kept in self._kept.values():
            total += distinct_bytes(kept.leaves.values(), counted)
            total += distinct_bytes(saved_tensors(kept.roots.values()), counted)
        return total

    def close(self) -> None:
        self._closed = True
        self._kept.clear()
        self._deferred.clear()
        self._functions.clear()
        self._optimizer.clear()
        self._buffers_before.clear()
        self._tied.clear()
        self._weights.clear()
        release_cached_memory(self._device)

    def _check_open(self) -> None:
        if self._closed:
            raise JobError("this program is closed")

    def _subdag(self, stage: int) -> SubDag:
        self._check_open()
        if stage not in self._subdags:
            raise GraphError(f"stage {stage} is not part of this program; its stages are {list(self._subdags)}")
        return self._subdags[stage]


def _name(stage: int, microbatch: MicrobatchKey) -> str:
    return f"stage {stage}, step {microbatch.step}, microbatch {microbatch.index}"


def _separate(weights: Sequence[Tensor], taken: set[int]) -> None:
    """Give each new gradient memory of its own.

    In torch, gradients may share memory with one another and with a gradient that came from outside (through views,
    such as `x + bias.view(...)`). The next microbatch adds to a gradient in place, which would change the other one.
    """
    for weight in weights:
        if weight.grad is None:
            continue
        address = storage_address(weight.grad)
        if address in taken:
            weight.grad = weight.grad.clone()
        taken.add(address)
