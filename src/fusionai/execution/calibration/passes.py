"""Times the passes of a reference stage on a plane."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fusionai.execution.calibration.reference_graph import DecoderShape, reference_stage
from fusionai.execution.plane import Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.graph.cost import StageCost, stage_cost
from fusionai.graph.model import SubDag, Weight
from fusionai.graph.sizes import concrete, type_bytes
from fusionai.tensor import TensorData

Precision = Literal["fp32", "bf16"]

_MICROBATCHES = 3
"""Microbatches of a step. As in training, the first one's gradients are stored, and the others' are added."""

_CLIPPED = 0.5
"""Factor on the gradients, below 1 so that the update includes the work of clipping."""

_FEWEST_STEPS = 1
_MOST_STEPS = 50


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Cost of a stage, and the median seconds of its passes and of a step's update."""

    cost: StageCost
    forward_s: float
    backward_s: float
    update_s: float


def time_stage(
    plane: Plane, device: str, shape: DecoderShape, precision: Precision, seconds: float, pause_s: float = 0.0
) -> StageSeconds:
    """Run training steps of the reference decoder for about `seconds`, at least one after a microbatch to warm up.

    The device rests for `pause_s` seconds before each pass.
    """
    stage = reference_stage(shape)
    program = plane.load([stage], ProgramOptions(device=device, precision=precision))
    try:
        for weight in stage.weights:
            program.load(weight.key, _start_of(weight))
        forward_s, backward_s, update_s = _timed_steps(program, stage, shape, seconds, pause_s)
    finally:
        program.close()
    return StageSeconds(
        stage_cost(stage, shape.sizes),
        statistics.median(forward_s),
        statistics.median(backward_s),
        statistics.median(update_s),
    )


def _timed_steps(
    program: RoundProgram, stage: SubDag, shape: DecoderShape, seconds: float, pause_s: float
) -> tuple[list[float], list[float], list[float]]:
    random = np.random.default_rng(0)
    values = {item.name: _tokens(random, concrete(item.type, shape.sizes), shape.vocabulary) for item in stage.inputs}
    for transfer in stage.receives:
        hidden = random.standard_normal(concrete(transfer.type, shape.sizes), dtype=np.float32)
        values[transfer.value] = TensorData("float32", hidden.shape, hidden.tobytes())
    # Reading a weight waits until the device has worked through its queue. The smallest weight is read fastest.
    smallest = min(stage.weights, key=lambda weight: type_bytes(weight.type, {})).key
    forward_s: list[float] = []
    backward_s: list[float] = []
    update_s: list[float] = []
    until_s = 0.0
    for step in range(1 + _MOST_STEPS):
        for index in range(_MICROBATCHES if step else 1):
            key = MicrobatchKey(step, index)
            time.sleep(pause_s)
            start_s = time.perf_counter()
            # `forward` returns the loss, so the device's queue is empty when it returns.
            program.forward(stage.index, key, shape.sizes, values, train=True)
            forward_s.append(time.perf_counter() - start_s)
            time.sleep(pause_s)
            start_s = time.perf_counter()
            program.backward(stage.index, key, {}, 1 / _MICROBATCHES)
            program.finish_backward()
            program.read_gradient(smallest)
            backward_s.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        program.gradient_norms()
        program.update(1e-6, _CLIPPED)
        program.read(smallest)
        update_s.append(time.perf_counter() - start_s)
        if step == 0:
            for samples in (forward_s, backward_s, update_s):
                samples.clear()
            until_s = time.perf_counter() + seconds
        elif step >= _FEWEST_STEPS and time.perf_counter() >= until_s:
            break
    return forward_s, backward_s, update_s


def _tokens(random: np.random.Generator, shape: tuple[int, ...], vocabulary: int) -> TensorData:
    ids = random.integers(0, vocabulary, shape, dtype=np.int64)
    return TensorData("int64", shape, ids.tobytes())


def _start_of(weight: Weight) -> TensorData:
    """Return a weight's first value: ones for a norm, small random numbers for a matrix."""
    shape = tuple(int(size) for size in weight.type.shape)
    random = np.random.default_rng(len(weight.key))
    values = np.ones(shape) if len(shape) == 1 else 0.02 * random.standard_normal(shape)
    return TensorData("float32", shape, values.astype(np.float32).tobytes())
