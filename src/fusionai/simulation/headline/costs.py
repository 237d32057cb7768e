"""What a captured model costs on machines that are all alike, for any batch: two costings and the line through them.

Array suffixes: P = positions at which the graph may be cut, both ends included; S = P - 1 segments between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from fusionai.graph.cost import StageCost, stage_cost
from fusionai.graph.cuts import crossing_bytes, cut, cut_points
from fusionai.graph.model import OpDag, Sizes
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.estimator import deferred_s, flops_rate
from fusionai.scheduling.links import Floats
from fusionai.scheduling.profile import DeviceProfile
from fusionai.scheduling.segments import Segments, make_segments

ModelUse: TypeAlias = Literal["training", "inference"]

PRECISION = "bf16"

ADAM_COPIES = 6
"""Optimizer's memory in tensors of 2 bytes: an fp32 master copy and two fp32 moments. With weights and gradients in
bf16 that is 16 bytes a parameter."""

_WEIGHTS_ONLY = -1
"""The same for inference: `training_bytes` counts weights and gradients besides, and only weights are there."""

_ALIVE = 4
"""Tensors of the largest size that live at once in a forward: a chain's input and output, a residual, one more."""

_MOST_POSITIONS = 240


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A captured model of half-precision weights, without weights."""

    name: str
    graph: OpDag
    tokens: int
    """Tokens of a sample, which is one sequence."""
    sizes: Callable[[int], Sizes]
    """Sizes of a batch of so many samples."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Costs:
    """A model in one task, costed with batches of one and two: all that matters grows in proportion to the rest."""

    model: Model
    task: ModelUse
    one: Segments
    two: Segments
    weight_bytes: float
    """Bytes of all weights of the model, tied ones once."""
    tied_bytes: float
    """Bytes of weights that several segments hold: each stage with such a segment has them."""
    tied_segments: tuple[int, ...]
    working_bytes: tuple[Floats, Floats]
    """Working space of each segment's forward, with batches of one and two."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranges:
    """Costs of ranges [i, j) of the line on one device, for one batch size. Seconds and bytes are of a microbatch."""

    forward_s_PP: Floats
    """Inf where the range is empty, as in all tables of ranges."""
    backward_s_PP: Floats
    """0 in inference."""
    deferred_s_PP: Floats
    """The part of the backward that follows the sending of its gradients (`estimator.deferred_s`)."""
    fixed_bytes_PP: Floats
    flight_bytes_PP: Floats
    """For each microbatch in flight."""
    forward_bytes_P: Floats
    """What crosses a position."""
    gradient_bytes_P: Floats
    weight_bytes_P: Floats
    """Bytes of the weights of all segments before a position."""

    @property
    def seconds_PP(self) -> Floats:
        """Return the seconds of forward and backward together."""
        return self.forward_s_PP + self.backward_s_PP


def costs_of(model: Model, task: ModelUse) -> Costs:
    """Cost a model. Blocks for seconds."""
    sizes = model.sizes(1)
    points = cut_points(model.graph, sizes)
    if len(points) > _MOST_POSITIONS:
        # The cheapest of each stretch, as the planner does.
        crossing, step = crossing_bytes(model.graph, sizes), len(points) / _MOST_POSITIONS
        stretches = [points[int(k * step) : int((k + 1) * step)] for k in range(_MOST_POSITIONS)]
        points = [min(stretch, key=lambda point: crossing[point]) for stretch in stretches if stretch]
    positions = [0, *points, len(model.graph.nodes)]
    states = ADAM_COPIES if task == "training" else _WEIGHTS_ONLY
    one, two = (make_segments(model.graph, model.sizes(b), positions, optimizer_states=states) for b in (1, 2))
    whole = stage_cost(cut(model.graph, [])[0], sizes)
    tied_bytes, tied_segments = _tied(model, positions)
    return Costs(
        model=model,
        task=task,
        one=one,
        two=two,
        weight_bytes=float(whole.trainable_bytes),
        tied_bytes=tied_bytes,
        tied_segments=tied_segments,
        working_bytes=(_working_bytes(model, positions, 1), _working_bytes(model, positions, 2)),
    )


def _tied(model: Model, positions: Sequence[int]) -> tuple[float, tuple[int, ...]]:
    """Return the bytes of the trainable weights that several segments hold, and all those segments."""
    holders: dict[str, list[int]] = {}
    size_bytes: dict[str, int] = {}
    for segment, subdag in enumerate(cut(model.graph, positions[1:-1])):
        for weight in {weight.key: weight for weight in subdag.weights if weight.trainable}.values():
            holders.setdefault(weight.key, []).append(segment)
            size_bytes[weight.key] = type_bytes(weight.type, model.sizes(1))
    tied = [key for key, segments in holders.items() if len(segments) > 1]
    return float(sum(size_bytes[key] for key in tied)), tuple(sorted({each for key in tied for each in holders[key]}))


def _working_bytes(model: Model, positions: Sequence[int], batch: int) -> Floats:
    """Return the working space of each segment's forward: a few times the largest tensor that it makes."""
    graph, sizes = model.graph, model.sizes(batch)
    made = [max((type_bytes(graph.types[each], sizes) for each in node.outputs), default=0) for node in graph.nodes]
    return np.asarray([_ALIVE * max(made[start:stop]) for start, stop in pairwise(positions)], dtype=np.float64)


def ranges_of(costs: Costs, device: DeviceProfile, batch: int) -> Ranges:
    """Return the costs of every range on a device: FLOPs and bytes at its rates, or the starting of operators.

    The estimator's model (`fusionai.scheduling.estimator.pass_s`) for a device whose operators are queued ahead.
    """

    def along(one: Floats, two: Floats) -> Floats:
        return one + (batch - 1) * (two - one)

    def work(pass_of: Callable[[StageCost], tuple[dict[str, int], int]]) -> Floats:
        rows = [[_work_s(device, *pass_of(cost)) for cost in each.costs] for each in (costs.one, costs.two)]
        return along(*np.asarray(rows))

    forward = _sums(work(lambda cost: (cost.forward_flops, cost.forward_bytes)))
    starts = _sums(np.asarray([cost.operators for cost in costs.one.costs]) * device.overhead_s)
    forward = np.maximum(forward, starts)
    empty = np.tri(len(forward), dtype=bool)
    forward[empty] = np.inf
    one, two, training = costs.one, costs.two, costs.task == "training"
    backward, deferred = np.where(empty, np.inf, 0.0), np.where(empty, np.inf, 0.0)
    if training:
        starts = _sums(np.asarray([cost.backward_operators for cost in costs.one.costs]) * device.overhead_s)
        whole = _sums(work(lambda cost: (cost.backward_flops, cost.backward_bytes)))
        backward = np.where(empty, np.inf, np.maximum(whole, starts))
        rows = [[deferred_s(cost, device, PRECISION) for cost in each.costs] for each in (one, two)]
        deferred = np.where(empty, np.inf, np.minimum(backward, _sums(along(*np.asarray(rows)))))
    tables = [
        each.fixed_bytes_PP if training else _forward_bytes(each, working)
        for each, working in zip((one, two), costs.working_bytes, strict=True)
    ]
    with np.errstate(invalid="ignore"):
        fixed = np.where(empty, np.inf, along(*tables))
        flight = np.where(empty, np.inf, along(one.flight_bytes_PP, two.flight_bytes_PP) if training else 0.0)
    forward_bytes = along(one.forward_bytes_P, two.forward_bytes_P)
    return Ranges(
        forward_s_PP=forward,
        backward_s_PP=backward,
        deferred_s_PP=deferred,
        fixed_bytes_PP=fixed,
        flight_bytes_PP=flight,
        forward_bytes_P=forward_bytes,
        gradient_bytes_P=along(one.gradient_bytes_P, two.gradient_bytes_P) if training else 0.0 * forward_bytes,
        weight_bytes_P=np.concatenate([[0.0], np.cumsum([float(cost.trainable_bytes) for cost in one.costs])]),
    )


def _forward_bytes(segments: Segments, working_bytes: Floats) -> Floats:
    """Return the memory of each range in inference: weights, and the working space of the segment that needs most.

    The segments' own working space is that of training, in which gradients of weights are the largest part.
    """
    table = segments.fixed_bytes_PP.copy()
    training = np.asarray([cost.transient_bytes for cost in segments.costs], dtype=np.float64)
    for start in range(len(training)):
        table[start, start + 1 :] += np.maximum.accumulate(working_bytes[start:])
        table[start, start + 1 :] -= np.maximum.accumulate(training[start:])
    return table


def _work_s(device: DeviceProfile, flops: dict[str, int], moved_bytes: int) -> float:
    seconds = sum(amount / flops_rate(device, name, PRECISION) for name, amount in flops.items() if amount)
    return seconds + moved_bytes / device.memory_bytes_per_s


def _sums(parts_S: Floats) -> Floats:
    total = np.concatenate([[0.0], np.cumsum(parts_S)])
    return np.asarray(total[None] - total[:, None], dtype=np.float64)
