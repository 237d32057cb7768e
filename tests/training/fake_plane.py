"""A plane for tests of what drives programs: three operators on float64, and a program that checks how it is called.

It interprets the real OP-DAG (`aten.mul.Tensor`, `aten.add.Tensor`, `aten.mse_loss.default`), so a job on it can be
compared with one program that holds the whole graph. Gradients are summed by microbatch and stage, whatever the order
in which backwards came, so equal jobs give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusionai.errors import ConfigError, GraphError
from fusionai.execution.plane import Calibration, Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.graph.abilities import PlaneAbilities
from fusionai.graph.evaluation import face
from fusionai.graph.model import Ref, Sizes, SubDag, ValueName, Weight, WeightKey
from fusionai.graph.sizes import concrete
from fusionai.tensor import TensorData

ABILITIES = PlaneAbilities(
    plane="fake",
    operators=("aten.add.Tensor", "aten.mse_loss.default", "aten.mul.Tensor"),
    dtypes=("float32", "float64"),
    training=True,
    decoding=False,
)
MOMENTUM = "momentum_buffer"
Array = Any


def data(values: Any, dtype: str = "float64") -> TensorData:
    """Numbers as a tensor."""
    array = np.asarray(values, dtype=dtype)
    return TensorData(dtype, array.shape, bytearray(array.tobytes()))  # type: ignore[arg-type]


def array(tensor: TensorData) -> Array:
    """A copy of a tensor's numbers."""
    return np.frombuffer(bytes(tensor.data), dtype=tensor.dtype).reshape(tensor.shape).copy()


class FakePlane(Plane):
    """Makes fake programs and remembers them."""

    name = "fake"

    def __init__(self) -> None:
        self.programs: list[FakeProgram] = []
        self.broken: list[str] = []
        """Every breach of `RoundProgram`'s contract."""
        self.on_call: Callable[[str], None] = lambda call: None
        """Called with each call, such as "forward 1 of 0/2" (stage 1, step 0, microbatch 2); may raise."""

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def describe(self, device: str) -> str:
        return "fake device"

    def device_memory_bytes(self, device: str) -> int:
        return 1 << 30

    def abilities(self, device: str) -> PlaneAbilities:
        return ABILITIES

    def calibrate(self, device: str, *, seconds: float = 2.0) -> Calibration:
        return Calibration({"matmul": 1e9}, 1e9, 1e-6)

    def set_threads(self, count: int) -> None:
        pass

    def load(self, subdags: Sequence[SubDag], options: ProgramOptions) -> FakeProgram:
        self.on_call("load program")
        for subdag in subdags:
            if obstacle := ABILITIES.obstacle(subdag, "training"):
                raise GraphError(obstacle)
        if options.optimizer.kind != "sgd":
            raise ConfigError("the fake plane has SGD only")
        program = FakeProgram(self, subdags, options)
        self.programs.append(program)
        return program


class FakeProgram(RoundProgram):
    """Some stages of a graph of multiplications and additions."""

    def __init__(self, plane: FakePlane, subdags: Sequence[SubDag], options: ProgramOptions) -> None:
        self.calls: list[str] = []
        self.closed = False
        self.updates = 0
        """Updates made here, in contrast to `optimizer_step`, which may have been set."""
        self.discards = 0
        self._plane = plane
        self._stages = {subdag.index: subdag for subdag in subdags}
        self._options = options
        self._types: dict[WeightKey, Weight] = {each.key: each for subdag in subdags for each in subdag.weights}
        self._weights: dict[WeightKey, Array] = {}
        self._states: dict[WeightKey, Array] = {}
        self._kept: dict[tuple[int, MicrobatchKey], dict[ValueName, Array]] = {}
        self._done: set[tuple[int, MicrobatchKey]] = set()
        """Microbatches that went backward since the last update: none may do so twice."""
        self._gradients: dict[WeightKey, dict[tuple[int, int], Array]] = {}
        """By weight: what each microbatch and stage (the last first) adds."""
        self._sums: dict[WeightKey, Array] = {}
        """Gradients that were set, in place of what the microbatches add up to."""
        self._step = 0
        self._inside = False

    # --- weights ----------------------------------------------------------------------------------------------

    def load(self, key: WeightKey, tensor: TensorData, state: str | None = None) -> None:
        self._called(f"load {key}{'' if state is None else '::' + state}")
        weight = self._types.get(key)
        if weight is None:
            raise GraphError(f"the weight {key!r} is not held here")
        if (tensor.dtype, tensor.shape) != (weight.type.dtype, weight.type.shape):
            raise GraphError(f"the weight {key!r} came as {tensor.dtype}{list(tensor.shape)}")
        (self._weights if state is None else self._states)[key] = array(tensor)

    def missing(self) -> tuple[WeightKey, ...]:
        return tuple(key for key in self._types if key not in self._weights)

    def keys(self) -> tuple[WeightKey, ...]:
        return tuple(self._types)

    def read(self, key: WeightKey, state: str | None = None) -> TensorData:
        self._called(f"read {key}{'' if state is None else '::' + state}")
        weight = self._weights[key]
        return data(weight if state is None else self._states.get(key, np.zeros_like(weight)))

    def optimizer_step(self) -> int:
        return self._step

    def set_optimizer_step(self, step: int) -> None:
        self._called(f"set step {step}")
        self._step = step

    # --- passes -----------------------------------------------------------------------------------------------

    def forward(
        self,
        stage: int,
        microbatch: MicrobatchKey,
        sizes: Sizes,
        values: Mapping[ValueName, TensorData],
        *,
        train: bool = True,
    ) -> dict[ValueName, TensorData]:
        self._called(f"{'forward' if train else 'evaluate'} {stage} of {microbatch.step}/{microbatch.index}")
        subdag = face(self._stages[stage], train)
        types = {item.name: item.type for item in subdag.inputs} | {each.value: each.type for each in subdag.receives}
        self._expect(values.keys() == types.keys(), f"stage {stage} is given {sorted(values)}, takes {sorted(types)}")
        for name, tensor in values.items():
            self._expect(tensor.shape == concrete(types[name], sizes), f"{name} has the shape {tensor.shape}")
        self._expect(not self.missing(), "forward before all weights are loaded")
        self._expect((stage, microbatch) not in self._kept | dict.fromkeys(self._done), "forward twice")
        known = {name: array(tensor) for name, tensor in values.items()}
        known |= {weight.name: self._weights[weight.key] for weight in subdag.weights}
        for node in subdag.nodes:
            one, other = (known[each.name] for each in node.args if isinstance(each, Ref))
            match node.op:
                case "aten.mul.Tensor":
                    known[node.outputs[0]] = one * other
                case "aten.add.Tensor":
                    known[node.outputs[0]] = one + other
                case _:
                    known[node.outputs[0]] = np.mean((one - other) ** 2)
        if train:
            self._kept[stage, microbatch] = known
        found = {each.value: data(known[each.value]) for each in subdag.sends}
        if subdag.loss is not None:
            found[subdag.loss] = data(known[subdag.loss], "float32")
        return found

    def backward(
        self,
        stage: int,
        microbatch: MicrobatchKey,
        gradients: Mapping[ValueName, Sequence[TensorData]],
        loss_weight: float = 1.0,
    ) -> dict[ValueName, TensorData]:
        self._called(f"backward {stage} of {microbatch.step}/{microbatch.index}")
        subdag = self._stages[stage]
        known = self._kept.pop((stage, microbatch), {})
        self._expect(bool(known), f"backward {stage} of {microbatch} without forward")
        self._done.add((stage, microbatch))
        due: dict[ValueName, int] = {}
        for each in subdag.sends:
            if each.gradient:
                due[each.value] = due.get(each.value, 0) + 1
        self._expect({name: len(each) for name, each in gradients.items()} == due, "gradients are not those due")
        found: dict[ValueName, Array] = {}

        def add(name: ValueName, gradient: Array) -> None:
            if gradient.ndim > known[name].ndim:
                gradient = gradient.sum(axis=0)  # a weight serves every row
            found[name] = found[name] + gradient if name in found else gradient

        for name, parts in gradients.items():
            for part in parts:
                add(name, array(part))
        if subdag.loss is not None:
            found[subdag.loss] = np.float64(loss_weight)
        for node in reversed(subdag.nodes):
            if node.outputs[0] not in found:
                continue
            gradient = found[node.outputs[0]]
            one, other = (each.name for each in node.args if isinstance(each, Ref))
            match node.op:
                case "aten.mul.Tensor":
                    add(one, gradient * known[other])
                    add(other, gradient * known[one])
                case "aten.add.Tensor":
                    add(one, gradient)
                    add(other, gradient)
                case _:
                    add(one, gradient * 2 * (known[one] - known[other]) / known[one].size)
        for weight in subdag.weights:
            if weight.trainable and weight.name in found:
                parts_of = self._gradients.setdefault(weight.key, {})
                slot = (microbatch.index, -stage)
                parts_of[slot] = parts_of[slot] + found[weight.name] if slot in parts_of else found[weight.name]
        return {each.value: data(found[each.value]) for each in subdag.receives if each.gradient}

    def discard(self, microbatch: MicrobatchKey | None = None) -> None:
        self._called("discard")
        self.discards += 1
        if microbatch is None:
            self._kept.clear()
            self._clear()
        else:
            for slot in [each for each in self._kept if each[1] == microbatch]:
                del self._kept[slot]

    # --- gradients --------------------------------------------------------------------------------------------

    def _gradient(self, key: WeightKey) -> Array:
        if key in self._sums:
            return self._sums[key]
        total = np.zeros_like(self._weights[key])
        for _, part in sorted(self._gradients.get(key, {}).items(), key=lambda each: each[0]):
            total = total + part
        return total

    def gradient_norms(self, skip: Sequence[WeightKey] = ()) -> dict[WeightKey, float]:
        self._called("norms")
        with_gradient = [key for key in self._types if key in self._gradients or key in self._sums]
        return {key: float(np.sqrt((self._gradient(key) ** 2).sum())) for key in with_gradient if key not in skip}

    def read_gradient(self, key: WeightKey) -> TensorData:
        self._called(f"read gradient {key}")
        return data(self._gradient(key))

    def set_gradient(self, key: WeightKey, gradients: Sequence[TensorData]) -> None:
        self._called(f"set gradient {key}")
        total = array(gradients[0])
        for part in gradients[1:]:
            total = total + array(part)
        self._sums[key] = total

    def update(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        self._called("update")
        self._expect(not self._kept, "an update while microbatches wait for their backward")
        momentum = self._options.optimizer.momentum
        for key, weight in self._types.items():
            if weight.trainable:
                gradient = self._gradient(key) * gradient_scale
                if momentum:
                    state = self._states.get(key)
                    gradient = gradient if state is None else momentum * state + gradient
                    self._states[key] = gradient
                self._weights[key] = self._weights[key] - learning_rate * gradient
        self._clear()
        self._step += 1
        self.updates += 1

    def _clear(self) -> None:
        self._gradients.clear()
        self._sums.clear()
        self._done.clear()

    # --- the rest ---------------------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        self._called("memory")
        return 8 * sum(each.size for each in self._weights.values())

    def close(self) -> None:
        self._expect(not self.closed, "closed twice")
        self.closed = True

    def _called(self, call: str) -> None:
        self._expect(not self.closed, f"{call} after close")
        self._expect(not self._inside, f"{call} during another call")
        self._inside = True
        try:
            self.calls.append(call)
            self._plane.on_call(call)
        finally:
            self._inside = False

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self._plane.broken.append(what)
            raise AssertionError(what)
