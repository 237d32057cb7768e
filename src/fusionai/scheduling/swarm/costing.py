"""Costs a task's graph in segments on every machine: how a `Work` is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusionai.graph.cost import StageCost
from fusionai.graph.cuts import Cutter, cut_points, thinned
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.estimator import deferred_s, flops_rate
from fusionai.scheduling.links import Floats
from fusionai.scheduling.profile import DeviceProfile
from fusionai.scheduling.segments import make_segments
from fusionai.scheduling.swarm.task import SwarmTask
from fusionai.scheduling.swarm.work import Crossing, Work

_MOST_POSITIONS = 128
_MOST_POSITIONS_OF_MANY = 64
"""More cut points than this are thinned out: tables grow with their square, and a pool has many chains."""

_MANY_MACHINES = 1000


def make_work(task: SwarmTask) -> Work:
    """Cost a task's graph in segments on every machine.

    Raises PlacementError for a device whose rates are not known, and GraphError for a graph that cannot be costed.
    """
    cutter = Cutter(task.graph)
    positions = _positions(task, cutter)
    segments = make_segments(task.graph, task.sizes, positions, optimizer_states=task.optimizer_states, cutter=cutter)
    subdags = cutter.cut([position for position in positions if 0 < position < len(task.graph.nodes)])
    before = len(segments.outer) - segments.outer_after
    all_costs = (*segments.outer[:before], *segments.costs, *segments.outer[before:])
    crossings = [
        Crossing(each.value, each.source, each.target, type_bytes(each.type, task.sizes), each.gradient)
        for subdag in subdags
        for each in subdag.sends
    ]
    users: dict[str, tuple[int, list[int]]] = {}
    for part, subdag in enumerate(subdags):
        for weight in {weight.key: weight for weight in subdag.weights if weight.trainable}.values():
            users.setdefault(weight.key, (type_bytes(weight.type, task.sizes), []))[1].append(part)
    tables = _device_tables(task, segments.costs)
    return Work(
        task=task,
        cutter=cutter,
        segments=segments,
        all_costs=all_costs,
        crossings=tuple(crossings),
        weights=tuple((size, tuple(parts)) for size, parts in users.values()),
        forward_NS=tables[0],
        backward_NS=tables[1],
        forward_starts_NS=tables[2],
        backward_starts_NS=tables[3],
        deferred_NS=tables[4],
        additive_N=np.asarray([float(each.device.device == "cpu") for each in task.machines]),
        stage_costs={},
        schedules={},
    )


def _positions(task: SwarmTask, cutter: Cutter) -> list[int]:
    """Return the positions considered, the cheapest of each stretch where there are too many."""
    points = cut_points(task.graph, task.sizes, within=(task.front, task.back), cutter=cutter)
    most = _MOST_POSITIONS if len(task.members) <= _MANY_MACHINES else _MOST_POSITIONS_OF_MANY
    return [task.front, *thinned(task.graph, task.sizes, points, most), task.back]


def _device_tables(task: SwarmTask, costs: Sequence[StageCost]) -> list[Floats]:
    """Return (N, S): computing forward and backward, starting operators forward and backward, and deferred seconds."""
    found: dict[tuple[object, ...], list[list[float]]] = {}
    rows: list[list[list[float]]] = []
    for member in task.machines:
        device = member.device
        key = (*sorted(device.flops_per_s.items()), device.memory_bytes_per_s, device.overhead_s)
        if key not in found:
            found[key] = _device_rows(device, task.precision, costs)
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
