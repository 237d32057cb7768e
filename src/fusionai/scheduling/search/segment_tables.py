"""Costs the graph of a problem in segments on every machine: how `SegmentCosts` is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusionai.graph.cost import StageCost
from fusionai.graph.cuts import cut_points, thinned
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.estimator import deferred_s, flops_rate
from fusionai.scheduling.links import Floats
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import DeviceProfile
from fusionai.scheduling.search.segment_costs import Crossing, SegmentCosts
from fusionai.scheduling.segments import make_segments
from fusionai.scheduling.stage_costs import StageWeights, trained_weights

_MOST_POSITIONS = 128
_MOST_POSITIONS_OF_MANY = 64
"""More cut points than this are thinned out: tables grow with their square, and a pool has many chains."""

_MANY_MACHINES = 1000


def costs_in_segments(problem: TrainingProblem, positions: Sequence[int] | None = None) -> SegmentCosts:
    """Cost a problem's graph in segments on every machine.

    `positions`: the node positions considered, both ends of the distributed part among them; None: the best of each
    stretch of the graph.

    Raises PlacementError for a device whose rates are not known, and GraphError for a graph that cannot be costed.
    """
    graph, sizes, cutter = problem.graph, problem.sizes, problem.costs.cutter(problem.graph)
    if positions is None:
        most = _MOST_POSITIONS if len(problem.members) <= _MANY_MACHINES else _MOST_POSITIONS_OF_MANY
        positions = cut_positions(problem, most)
    segments = make_segments(graph, sizes, positions, optimizer_states=problem.optimizer_states, cutter=cutter)
    inner = [position for position in positions if 0 < position < len(graph.nodes)]
    subdags = cutter.cut(inner)
    before = len(segments.outer) - segments.outer_after
    crossings = [
        Crossing(each.value, each.source, each.target, type_bytes(each.type, sizes), each.gradient)
        for subdag in subdags
        for each in subdag.sends
    ]
    tables = _device_tables(problem, segments.costs)
    return SegmentCosts(
        problem=problem,
        segments=segments,
        all_costs=(*segments.outer[:before], *segments.costs, *segments.outer[before:]),
        crossings=tuple(crossings),
        trained=trained_weights(
            (0, *inner, len(graph.nodes)), [StageWeights(subdag.weights) for subdag in subdags], sizes
        ),
        forward_NS=tables[0],
        backward_NS=tables[1],
        forward_starts_NS=tables[2],
        backward_starts_NS=tables[3],
        deferred_NS=tables[4] if problem.split_backward else np.zeros_like(tables[4]),
        additive_N=np.asarray([float(each.device.device == "cpu") for each in problem.machines]),
    )


def cut_positions(problem: TrainingProblem, most: int) -> list[int]:
    """Return the node positions considered, both ends of the distributed part among them.

    Of more than `most` that are worth cutting at, the cheapest of each stretch.
    """
    cutter = problem.costs.cutter(problem.graph)
    points = cut_points(problem.graph, problem.sizes, within=(problem.front, problem.back), cutter=cutter)
    return [problem.front, *thinned(problem.graph, problem.sizes, points, most), problem.back]


def _device_tables(problem: TrainingProblem, costs: Sequence[StageCost]) -> list[Floats]:
    """Return (N, S): computing forward and backward, starting operators forward and backward, and deferred seconds."""
    found: dict[tuple[object, ...], list[list[float]]] = {}
    rows: list[list[list[float]]] = []
    for member in problem.machines:
        device = member.device
        key = (*sorted(device.flops_per_s.items()), device.memory_bytes_per_s, device.overhead_s)
        if key not in found:
            found[key] = _device_rows(device, problem.precision, costs)
        rows.append(found[key])
    return list(np.asarray(rows, dtype=np.float64).transpose(1, 0, 2))


def _device_rows(device: DeviceProfile, precision: str, costs: Sequence[StageCost]) -> list[list[float]]:
    classes = {name for cost in costs for name in (*cost.forward_flops, *cost.backward_flops)}
    rates = {name: flops_rate(device, name, precision) for name in classes}
    forward = [sum(amount / rates[name] for name, amount in cost.forward_flops.items()) for cost in costs]
    backward = [sum(amount / rates[name] for name, amount in cost.backward_flops.items()) for cost in costs]
    moved = device.memory_bytes_per_s
    return [
        [seconds + cost.forward_bytes / moved for seconds, cost in zip(forward, costs, strict=True)],
        [seconds + cost.backward_bytes / moved for seconds, cost in zip(backward, costs, strict=True)],
        [cost.operators * device.overhead_s for cost in costs],
        [cost.backward_operators * device.overhead_s for cost in costs],
        [deferred_s(cost, device, precision) for cost in costs],
    ]
