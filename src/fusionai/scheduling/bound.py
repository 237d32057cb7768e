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


def most_microbatches_per_s(
    cost: StageCost,
    devices: Sequence[DeviceProfile],
    *,
    microbatches: int,
    precision: str,
    optimizer_states: int,
) -> list[float]:
    """Return, by device, what it adds at most to the microbatches per second of a step, as parts of the work go.

    Let w[n, k] be the seconds of all work of kind k of a step on device n, and p a price of each kind, p >= 0; prices
    add up to 1. A device that does the parts f[n, k] in T seconds has sum_k f[n, k] w[n, k] <= T, and does work worth
    sum_k p[k] f[n, k] <= T max_k p[k] / w[n, k]. All devices together do work worth at least 1, whatever subset takes
    part. The price of a kind is its part of the time on the fastest device. Arguments are those of `least_step_s`.
    """
    work_DK = [_work_s(cost, device, microbatches, precision, optimizer_states) for device in devices]
    fastest = min(work_DK, key=sum)
    prices = [seconds / sum(fastest) for seconds in fastest]
    return [
        microbatches * max(price / seconds for price, seconds in zip(prices, work, strict=True) if price)
        for work in work_DK
    ]


def least_step_of_pipelines_s(
    computing_s: float,
    rates_per_s: Sequence[float],
    alone: Sequence[bool],
    *,
    microbatches: int,
    most_stages: int,
    most_pipelines: int,
    weight_bytes: float,
    crossing_bytes: float,
    bandwidth_bytes_per_s: float,
    delay_s: float,
) -> float:
    """Return seconds below which no step of any number of pipelines on N machines can be, each machine in one of them.

    The least over the numbers R of pipelines of what is computed before, and of the sum of gradients after it:

    * A pipeline has `most_stages` machines at most, so R of them have at best the R `most_stages` of highest rates.
    * A pipeline of more than one machine sends each microbatch over at least one cut, `crossing_bytes` one way, so it
      takes at most `bandwidth_bytes_per_s` / `crossing_bytes` microbatches a second; others are a machine `alone` each.
    * Some pipeline has N / R machines or fewer, and one of those holds R / N of the weights or more. Their gradients
      are summed over R holders, for which each sends at least 2 (R - 1) / R of the bytes, in 2 (R - 1) rounds of a ring
      (Patarasuk and Yuan 2009).

    Args:
        computing_s: the least time of computing alone, on all machines.
        rates_per_s: by machine, `most_microbatches_per_s`.
        alone: by machine, whether it may hold the whole model.
        microbatches: of a step.
        most_stages: of a pipeline.
        most_pipelines: for which all machines together have memory.
        weight_bytes: of what is trained, weights that several stages read once.
        crossing_bytes: of a microbatch over the cheapest cut, in the direction with more of them.
        bandwidth_bytes_per_s: of the best link.
        delay_s: one-way latency of the best link.
    """
    fastest = sorted(rates_per_s, reverse=True)
    machines = len(fastest)
    by_themselves = sorted((rate for rate, can in zip(rates_per_s, alone, strict=True) if can), reverse=True)
    by_link = bandwidth_bytes_per_s / crossing_bytes if crossing_bytes else math.inf
    least_s, rate, taken, passing = math.inf, 0.0, 0, 0.0
    for pipelines in range(1, max(1, min(machines, most_pipelines, microbatches)) + 1):
        while taken < min(machines, pipelines * most_stages):
            rate += fastest[taken]
            taken += 1
        passing += max(by_link, by_themselves[pipelines - 1] if pipelines <= len(by_themselves) else 0.0)
        passed = min(rate, passing)
        summed_s = 0.0
        if pipelines > 1:
            summed_s = 2 * (pipelines - 1) * (weight_bytes / machines / bandwidth_bytes_per_s + delay_s)
        least_s = min(least_s, max(computing_s, microbatches / passed) + summed_s)
    return least_s


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
