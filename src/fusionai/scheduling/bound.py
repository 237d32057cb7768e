"""The least time that a step can take on given machines, whatever the plan.

Links are free, the work is divided without loss, and no machine waits. What remains is a linear programme: each kind of
work (matrix products, attention, bytes moved, ...) is divided over machines that differ in what they are good at. Any
prices of the machines' time that add up to 1 give a bound below its optimum, so a few sensible ones are tried and the
best is kept. For machines that are alike but for a factor it is the optimum: total work over the sum of speeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusionai.graph.cost import StageCost
from fusionai.scheduling.estimator import flops_rate, update_s
from fusionai.scheduling.profile import DeviceProfile


def least_step_s(
    cost: StageCost,
    devices: Sequence[DeviceProfile],
    *,
    microbatches: int,
    precision: str,
    optimizer_states: int,
) -> float:
    """Return seconds below which no plan on `devices` can bring a step, as the estimator counts.

    Args:
        cost: of the whole graph as one stage.
        devices: of all machines that may compute, the owner's among them if it does; at least one.
        microbatches: of a step.
        precision: of the job.
        optimizer_states: tensors that the optimizer keeps for each weight.
    """
    work = [_work_s(cost, device, microbatches, precision, optimizer_states) for device in devices]
    overheads = [microbatches * (cost.operators + cost.backward_operators) * device.overhead_s for device in devices]
    # A GPU's operators are queued ahead: of its work and its overhead the larger counts, so each gives a bound.
    return max(_divided_s(work), _divided_s([[each] for each in overheads]))


def _work_s(
    cost: StageCost, device: DeviceProfile, microbatches: int, precision: str, optimizer_states: int
) -> list[float]:
    """Return the seconds of all work of a step on one device, by kind."""
    seconds = [
        microbatches * (cost.forward_flops[name] + cost.backward_flops[name]) / flops_rate(device, name, precision)
        for name in sorted(cost.forward_flops)
    ]
    moved = microbatches * (cost.forward_bytes + cost.backward_bytes)
    overheads = microbatches * (cost.operators + cost.backward_operators) * device.overhead_s
    return [
        *seconds,
        moved / device.memory_bytes_per_s + update_s(cost, device, optimizer_states),
        overheads if device.device == "cpu" else 0.0,
    ]


def _divided_s(work_DK: Sequence[Sequence[float]]) -> float:
    """Return a bound on the time of work of K kinds divided over D devices, from each one's seconds for all of it."""
    candidates = [[sum(kinds) for kinds in work_DK], *([kinds[k] for kinds in work_DK] for k in range(len(work_DK[0])))]
    return max(_priced_s(work_DK, seconds) for seconds in candidates)


def _priced_s(work_DK: Sequence[Sequence[float]], seconds_D: Sequence[float]) -> float:
    """Return the bound when a device's time is as dear as it is fast: one over `seconds_D`."""
    if not all(0 < seconds < math.inf for seconds in seconds_D):
        return 0.0
    total = sum(1 / seconds for seconds in seconds_D)
    prices_D = [1 / seconds / total for seconds in seconds_D]
    kinds = range(len(work_DK[0]))
    # Each kind is done where it costs least.
    return sum(min(price * work[k] for price, work in zip(prices_D, work_DK, strict=True)) for k in kinds)
