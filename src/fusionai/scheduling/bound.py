"""The least time that a step can take on given machines, whatever the plan.

Links are free, the work is divided without loss, and no machine waits. What remains is a linear programme: each part of
the work (the passes of a segment between two possible cuts, and its update) is divided over machines that differ in
what they are good at. A machine that does a segment does all kinds of work in it, so products cannot go to one machine
and the moving of bytes to another. Any prices of the machines' time that add up to 1 give a bound below its optimum, so
a few sensible ones are tried and the best is kept. For machines that are alike but for a factor it is the optimum:
total work over the sum of speeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusionai.graph.cost import StageCost
from fusionai.scheduling.estimator import flops_rate, update_s
from fusionai.scheduling.links import Floats
from fusionai.scheduling.profile import DeviceProfile

_MUCH_DENSER = 1.5
"""Parts with so many times the usual bytes of weights for their work are left out of what weights tell of the pace."""

_LONG_PARTS = (0.01, 0.1, 0.3)
"""Shares of the longest part's time; shorter parts may be left out."""

_SHARES_TRIED = 200
"""Largest shares of the weights that a machine may hold, from a thousandth to all."""


def least_step_s(
    costs: Sequence[StageCost],
    devices: Sequence[DeviceProfile],
    *,
    microbatches: int,
    precision: str,
    optimizer_states: int,
    trained_bytes: Sequence[float] | None = None,
) -> float:
    """Return seconds below which no plan on `devices` can bring a step, as the estimator counts.

    Args:
        costs: of the parts of the graph that no plan divides: what lies between two places where it may be cut.
        devices: of all machines that may compute, the owner's among them if it does; at least one.
        microbatches: of a step.
        precision: of the job.
        optimizer_states: tensors that the optimizer keeps for each weight.
        trained_bytes: by part, of the weights that train, one that several parts read in one of them: a machine that
            holds them all updates it once. None where parts share none.
    """
    work = _work(costs, devices, microbatches, precision, optimizer_states, trained_bytes)
    return max(_divided_s(work.seconds_DK), _divided_s(work.starts_D[:, None]))


def most_microbatches_per_s(
    costs: Sequence[StageCost],
    devices: Sequence[DeviceProfile],
    *,
    microbatches: int,
    precision: str,
    optimizer_states: int,
    trained_bytes: Sequence[float] | None = None,
) -> list[float]:
    """Return, by device, what it adds at most to the microbatches per second of a step, as parts of the work go.

    Let w[n, k] be the seconds of part k of a step on device n, and p a price of each part, p >= 0; prices add up to 1.
    A device that does the shares f[n, k] in T seconds has sum_k f[n, k] w[n, k] <= T, and does work worth
    sum_k p[k] f[n, k] <= T max_k p[k] / w[n, k]. All devices together do work worth at least 1, whatever subset takes
    part. The price of a part is its share of the time on the fastest device; of several ways to leave short parts out,
    in which a slow device may be nearly as fast, that counts by which all devices together are slowest. Arguments are
    those of `least_step_s`.
    """
    seconds_DK = _work(costs, devices, microbatches, precision, optimizer_states, trained_bytes).seconds_DK
    fastest_K = seconds_DK[seconds_DK.sum(1).argmin()]
    found: list[Floats] = []
    for least in (0.0, *_LONG_PARTS):
        used = (fastest_K > 0) & (fastest_K >= least * fastest_K.max())
        prices_K = fastest_K[used] / fastest_K[used].sum()
        found.append(microbatches * (prices_K / seconds_DK[:, used]).max(1))
    return [float(each) for each in min(found, key=lambda rates: float(rates.sum()))]


@dataclass(frozen=True, slots=True)
class WeightPace:
    """How fast machines get through a graph if a part of the work counts as much as the weights that it takes."""

    nbytes: float
    """Bytes of all weights that count."""
    rates_per_s: tuple[float, ...]
    """By device: a device with the share f of the weights passes at most 1 / f of this many microbatches a second."""


def weight_paces(
    costs: Sequence[StageCost], nbytes: Sequence[float], devices: Sequence[DeviceProfile], *, precision: str
) -> tuple[WeightPace, ...]:
    """Return the pace of devices by weights, as several choices of weights tell it: each is true.

    Any weights may be left out. Those of short parts are, and those that many bytes are of and little work, such as an
    embedding's: they would make devices look fast.

    Args:
        costs: of the parts that no plan divides.
        nbytes: by part, of the weights that it alone reads and that are trained.
        devices: that may compute.
        precision: of the job.
    """
    nbytes_K = np.asarray(nbytes, dtype=np.float64)
    keys = [(*sorted(each.flops_per_s.items()), each.memory_bytes_per_s) for each in devices]
    kinds = dict(zip(keys, devices, strict=True))
    seconds = {key: np.asarray([_computing_s(cost, kinds[key], precision) for cost in costs]) for key in kinds}
    fastest_K = min(seconds.values(), key=lambda seconds_K: float(seconds_K.sum()))
    found: dict[tuple[int, ...], WeightPace] = {}
    for least in (0.0, *_LONG_PARTS):
        weighing = (nbytes_K > 0) & (fastest_K > 0) & (fastest_K >= least * fastest_K.max())
        if not weighing.any():
            continue
        dense_K, places = nbytes_K[weighing] / fastest_K[weighing], np.flatnonzero(weighing)
        rising = np.argsort(dense_K)
        until_s = np.cumsum(fastest_K[places[rising]])
        usual = dense_K[rising[np.searchsorted(until_s, until_s[-1] / 2)]]  # Of half of the work.
        counted = places[dense_K <= _MUCH_DENSER * usual]
        total = float(nbytes_K[counted].sum())
        rates = {key: float((nbytes_K[counted] / total / each_K[counted]).max()) for key, each_K in seconds.items()}
        found.setdefault(tuple(counted.tolist()), WeightPace(total, tuple(rates[key] for key in keys)))
    return tuple(found.values())


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
    paces: Sequence[WeightPace] = (),
) -> float:
    """Return seconds below which no step of any number of pipelines on N machines can be, each machine in one of them.

    The least over the numbers R of pipelines of what is computed before, and of the sum of gradients after it:

    * A pipeline has `most_stages` machines at most, so R of them have at best the R `most_stages` of highest rates.
    * A pipeline of more than one machine sends each microbatch over at least one cut, `crossing_bytes` one way, so it
      takes at most `bandwidth_bytes_per_s` / `crossing_bytes` microbatches a second; others are a machine `alone` each.
    * Some pipeline has N / R machines or fewer, and one of those holds R / N of the weights or more. Their gradients
      are summed over R holders, for which each sends at least 2 (R - 1) / R of the bytes, in 2 (R - 1) rounds of a ring
      (Patarasuk and Yuan 2009).
    * Whatever the largest share f of the weights that a machine holds: its sum takes at least 2 (R - 1) / R of f of the
      bytes, and in P seconds of passes no machine gets through more than f of each of its pipeline's microbatches,
      which are at most P times what a link passes. So all machines together get through P sum_n min(rate_n, f times
      that) microbatches. Small shares are summed fast and pass little, large ones the other way round.

    Args:
        computing_s: the least time of computing alone, on all machines.
        rates_per_s: by machine, `most_microbatches_per_s`.
        alone: by machine, whether it may hold the whole model.
        microbatches: of a step.
        most_stages: of a pipeline.
        most_pipelines: for which all machines together have memory.
        weight_bytes: of what is trained, weights that several stages read once.
        crossing_bytes: of a microbatch over the cheapest cut, in the direction with more of them.
        bandwidth_bytes_per_s: of the best link, 0 where no two machines can be linked.
        delay_s: one-way latency of the best link.
        paces: of the machines, in the order of `rates_per_s`; without any the last consideration is left out.
    """
    by_link = bandwidth_bytes_per_s / crossing_bytes if crossing_bytes else math.inf
    shares = [_Shares(pace, by_link) for pace in paces if math.isfinite(by_link)]
    fastest = sorted(rates_per_s, reverse=True)
    machines = len(fastest)
    by_themselves = sorted((rate for rate, can in zip(rates_per_s, alone, strict=True) if can), reverse=True)
    least_s, rate, taken, passing = math.inf, 0.0, 0, 0.0
    for pipelines in range(1, max(1, min(machines, most_pipelines, microbatches)) + 1):
        while taken < min(machines, pipelines * most_stages):
            rate += fastest[taken]
            taken += 1
        passing += max(by_link, by_themselves[pipelines - 1] if pipelines <= len(by_themselves) else 0.0)
        passed = min(rate, passing)
        passes_s = max(computing_s, microbatches / passed if passed else math.inf)
        summed_s = 0.0
        if pipelines > 1 and not bandwidth_bytes_per_s:
            break  # Nobody can be linked, so nothing is summed.
        if pipelines > 1:
            summed_s = 2 * (pipelines - 1) * (weight_bytes / machines / bandwidth_bytes_per_s + delay_s)
            at_best_s = max(
                (each.least_s(passes_s, microbatches, pipelines, taken, bandwidth_bytes_per_s) for each in shares),
                default=passes_s,
            )
            least_s = min(least_s, max(passes_s + summed_s, at_best_s + 2 * (pipelines - 1) * delay_s))
        else:
            least_s = min(least_s, passes_s)
    return least_s


class _Shares:
    """The trade between how much a machine holds of the weights and how long their sum takes."""

    def __init__(self, pace: WeightPace, by_link: float) -> None:
        """`by_link`: microbatches a second that a link passes."""
        self._nbytes, self._by_link = pace.nbytes, by_link
        self._rates_N = np.sort(np.asarray(pace.rates_per_s, dtype=np.float64))[::-1]
        self._sums = np.concatenate([[0.0], np.cumsum(self._rates_N)])
        # What lies between two of these passes no more than the larger and is summed no faster than the smaller.
        self._shares = np.geomspace(1e-3, 1.0, _SHARES_TRIED)
        self._caps = self._shares * by_link
        self._capped = np.searchsorted(-self._rates_N, -self._caps)

    def least_s(
        self, passes_s: float, microbatches: int, pipelines: int, machines: int, bandwidth_bytes_per_s: float
    ) -> float:
        """Return the least of passes and sum, over the largest share that a machine holds.

        `passes_s` is known of the passes already; `machines`: the fastest of them take part.
        """
        whole_s = 2 * (pipelines - 1) / pipelines * self._nbytes / bandwidth_bytes_per_s
        capped = np.minimum(self._capped, machines)
        rates = capped * self._caps + self._sums[machines] - self._sums[capped]
        # Nobody holds everything: each pipeline has a link.
        rates = np.minimum(rates, pipelines * self._by_link)
        passing_s = np.maximum(passes_s, microbatches / rates)
        summed_s = whole_s * np.concatenate([[0.0], self._shares[:-1]])
        return min(float((passing_s + summed_s).min()), passes_s + whole_s)


@dataclass(frozen=True, slots=True)
class _Work:
    """Seconds of a step. Suffixes: D = devices, K = parts of the work."""

    seconds_DK: Floats
    starts_D: Floats
    """Seconds to start operators, on devices that start them while they compute: the larger of the two counts."""


def _work(
    costs: Sequence[StageCost],
    devices: Sequence[DeviceProfile],
    microbatches: int,
    precision: str,
    optimizer_states: int,
    trained_bytes: Sequence[float] | None,
) -> _Work:
    """Return the seconds of all parts on each device. Parts that are alike are one; machines alike are costed once."""
    alike: list[tuple[StageCost, int]] = []
    if trained_bytes is not None:
        pairs = zip(costs, trained_bytes, strict=True)
        costs = [replace(cost, trainable_bytes=int(nbytes)) for cost, nbytes in pairs]
    for cost in costs:
        place = next((k for k, (known, _) in enumerate(alike) if known is cost or known == cost), None)
        if place is None:
            alike.append((cost, 1))
        else:
            alike[place] = alike[place][0], alike[place][1] + 1
    known: dict[tuple[object, ...], tuple[list[float], float]] = {}
    rows: list[tuple[list[float], float]] = []
    for device in devices:
        rates = device.memory_bytes_per_s, device.update_bytes_per_s, device.overhead_s, device.device
        key = *sorted(device.flops_per_s.items()), *rates
        if key not in known:
            parts, starts_s = [], 0.0
            for cost, count in alike:
                starting_s = microbatches * (cost.operators + cost.backward_operators) * device.overhead_s
                adds = device.device == "cpu"
                passes_s = microbatches * _computing_s(cost, device, precision) + (starting_s if adds else 0.0)
                parts += [count * passes_s, count * update_s(cost.trainable_bytes, device, optimizer_states)]
                starts_s += 0.0 if adds else count * starting_s
            known[key] = parts, starts_s
        rows.append(known[key])
    return _Work(np.asarray([parts for parts, _ in rows]), np.asarray([starts for _, starts in rows]))


def _computing_s(cost: StageCost, device: DeviceProfile, precision: str) -> float:
    """Return the seconds of a microbatch's two passes, the starting of operators apart."""
    flops_s = sum(
        (cost.forward_flops[name] + cost.backward_flops[name]) / flops_rate(device, name, precision)
        for name in cost.forward_flops
    )
    return flops_s + (cost.forward_bytes + cost.backward_bytes) / device.memory_bytes_per_s


def _divided_s(seconds_DK: Floats) -> float:
    """Return a bound on the time of work of K parts divided over D devices, from each one's seconds for all of it.

    A device's time is as dear as it is fast: at all of the work, or at one part of it.
    """
    dear_CD = [seconds_DK.sum(1), *seconds_DK.T]
    found = 0.0
    for seconds_D in dear_CD:
        if not ((seconds_D > 0) & np.isfinite(seconds_D)).all():
            continue
        prices_D = 1 / seconds_D / (1 / seconds_D).sum()
        # Each part is done where it costs least.
        found = max(found, float((prices_D[:, None] * seconds_DK).min(0).sum()))
    return found
