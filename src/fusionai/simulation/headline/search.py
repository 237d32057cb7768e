"""The fastest plan for machines and links that are all alike: how many pipelines, stages, and samples in a microbatch.

Where nothing differs, every pipeline is cut alike, and a min-max partition of the line is found exactly by bisection:
`fusionai.scheduling.swarm.planner` looks for the same among unlike machines, and plans training only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusionai.scheduling.links import Floats
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.simulation.codecs import Codec
from fusionai.simulation.headline.clusters import Cluster
from fusionai.simulation.headline.costs import ADAM_COPIES, Costs, Ranges, ranges_of

Flags: TypeAlias = NDArray[np.bool_]

BATCHES = (1, 2, 4, 8, 16, 32, 64)
STAGES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 25, 50)
_BISECTIONS = 26
_PIPELINE_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.12, 0.06, 0.0)
"""Of as many pipelines as there are machines for: over slow links fewer have less to sum. At least one."""
_HELD_SHARES = (0.0, 0.5, 1.0, 2.0)
"""Of the microbatches that 1F1B holds, for which memory is kept free when cutting. At least one."""
_ANY = "any"
"""The peer whose memory bandwidth a codec of equal machines is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan of equal pipelines, and what it takes. Seconds of a step of `samples` samples."""

    pipelines: int
    stages: int
    batch: int
    """Samples of a microbatch."""
    microbatches: int
    """Of each pipeline, in a step."""
    samples: int
    step_s: float
    pipeline_s: float
    """From the first pass to the last."""
    sum_s: float
    """Summing gradients over pipelines, and tied weights within them."""
    latency_s: float
    """One microbatch through everything, in training there and back."""
    period_s: float
    """Between two microbatches of a full pipeline."""
    limit: str
    """What sets the period, or the step."""
    computing_s: tuple[float, ...]
    """A microbatch, by stage."""
    sent_bytes: tuple[tuple[float, float], ...]
    """Forward and as gradients, packed, by boundary."""
    in_flight: tuple[int, ...]
    bounds: tuple[int, ...]
    """Of the stages, as positions of the costs' line."""

    @property
    def machines(self) -> int:
        """Return how many machines take part."""
        return self.pipelines * self.stages

    @property
    def busy_s(self) -> float:
        """Return the seconds for which all machines together compute."""
        return sum(self.computing_s) * self.microbatches * self.pipelines


@dataclass(frozen=True, slots=True, eq=False)
class _Loads:
    """What a microbatch of some samples costs over some links, by position of the line and by range of positions."""

    batch: int
    ranges: Ranges
    sent: tuple[Floats, Floats]
    seconds_PP: Floats
    """Computing and packing."""
    busy_P: Floats
    """Seconds of a link."""


class Searcher:
    """Finds plans for one model, task and kind of machine; what does not depend on links is costed once."""

    def __init__(self, costs: Costs, cluster: Cluster) -> None:
        """Cost the model on the cluster's device."""
        self.costs, self.device = costs, cluster.device
        self.ranges = {batch: ranges_of(costs, self.device, batch) for batch in BATCHES}

    def best(
        self,
        cluster: Cluster,
        codec: Codec,
        samples: int,
        *,
        memory: bool = True,
        batches: Sequence[int] = BATCHES,
    ) -> Found | None:
        """Return the fastest plan, None if nothing fits.

        Without `memory`, machines hold what falls to them, but pipelines are as long as equal shares of computing make
        them, and no more in number than all memory together has room for the model's copies.
        """
        found: Found | None = None
        for batch in batches:
            if batch > samples:
                break
            loads = self._loads(cluster, codec, batch)
            for stages in {min(each, cluster.count) for each in STAGES} if memory else (cluster.count,):
                for tried in self._tried(loads, cluster, codec, samples, stages, memory=memory):
                    if found is None or tried.step_s < found.step_s:
                        found = tried
        return found

    def _loads(self, cluster: Cluster, codec: Codec, batch: int) -> _Loads:
        ranges = self.ranges[batch]
        sent, packing = _packed(ranges, codec, self.device.memory_bytes_per_s)
        seconds = ranges.seconds_PP + packing[:, None] + packing[None]
        return _Loads(batch, ranges, sent, seconds, (sent[0] + sent[1]) / cluster.bytes_per_s)

    def _tried(
        self, loads: _Loads, cluster: Cluster, codec: Codec, samples: int, stages: int, *, memory: bool
    ) -> Iterator[Found]:
        """Yield plans of at most so many stages: cut with more or less memory for microbatches, of more or fewer
        pipelines."""
        ranges, budget, batch = loads.ranges, self.device.memory_bytes / MEMORY_MARGIN, loads.batch
        seconds, busy = loads.seconds_PP, loads.busy_P
        fits = np.isfinite(seconds)
        if memory:
            fits &= ranges.fixed_bytes_PP + ranges.flight_bytes_PP <= budget
        slowness = busy
        if not memory:
            # Else links would let one machine take everything: the cheapest cuts are free, and the others closed.
            inner = np.sort(busy[1:-1])
            slowness = np.where(busy <= inner[min(cluster.count, len(inner)) - 1] * 1.01, 0.0, np.inf)
        training = self.costs.task == "training"
        seen: set[tuple[int, ...]] = set()
        for share in _HELD_SHARES if memory and training else (0.0,):
            room = np.full_like(ranges.fixed_bytes_PP, np.inf)
            if share:
                with np.errstate(divide="ignore", invalid="ignore"):
                    room = (budget - ranges.fixed_bytes_PP) / ranges.flight_bytes_PP
                room = np.where(ranges.flight_bytes_PP > 0, room, np.inf)
            most = math.ceil(samples / batch)
            held = [min(most, max(1.0, share * (stages - place))) for place in range(stages)]
            bounds = _bounds(seconds, slowness, fits, room, held)
            if bounds is None or tuple(bounds) in seen:
                continue
            seen.add(tuple(bounds))
            pipelines = min(cluster.count // (len(bounds) - 1), most)
            if not memory:
                copies = cluster.count * budget / float(ranges.fixed_bytes_PP[0, -1])
                pipelines = min(pipelines, max(1, int(copies)))
            shares = _PIPELINE_SHARES if memory and training else (1.0,)
            for some in {max(1, round(pipelines * each)) for each in shares}:
                yield self._paced(loads, cluster, codec, samples, bounds, some, memory=memory)

    def _paced(
        self,
        loads: _Loads,
        cluster: Cluster,
        codec: Codec,
        samples: int,
        bounds: list[int],
        pipelines: int,
        *,
        memory: bool,
    ) -> Found:
        """Return what a partition gives in so many pipelines."""
        ranges, budget, batch = loads.ranges, self.device.memory_bytes / MEMORY_MARGIN, loads.batch
        sent, seconds, busy = loads.sent, loads.seconds_PP, loads.busy_P
        used = len(bounds) - 1
        count = math.ceil(samples / (pipelines * batch))
        computing = [float(seconds[start, stop]) for start, stop in pairwise(bounds)]
        both = 2 if self.costs.task == "training" else 1
        hops = [float(busy[cut]) + both * cluster.latency_s for cut in bounds[1:-1]]
        # From the start of a stage's forward to the end of its backward.
        rounds = [sum(computing[place:]) + sum(hops[place:]) for place in range(used)]
        largest_link = max((float(busy[cut]) for cut in bounds[1:-1]), default=0.0)
        period, limit = max(computing), "computing"
        if largest_link > period:
            period, limit = largest_link, "links between stages"
        in_flight = [count] * used
        if both == 2:
            most = [count] * used
            for place, (start, stop) in enumerate(pairwise(bounds)):
                if memory and (flight := float(ranges.flight_bytes_PP[start, stop])) > 0:
                    most[place] = min(count, int((budget - ranges.fixed_bytes_PP[start, stop]) / flight))
            in_flight = _in_flight(computing, hops, most, period)
            waiting = _waiting_s(computing, hops, in_flight)
            if in_flight[0] < count:
                if memory and waiting > period * 1.1:
                    limit = "memory for microbatches on their way"
                period = max(period, waiting)
        pipeline_s = rounds[0] + (count - 1) * period
        sum_s, update_s = self._end(cluster, codec, pipelines, bounds) if both == 2 else (0.0, 0.0)
        if sum_s > pipeline_s:
            limit = "summing gradients"
        return Found(
            pipelines=pipelines,
            stages=used,
            batch=batch,
            microbatches=count,
            samples=samples,
            step_s=pipeline_s + sum_s + update_s,
            pipeline_s=pipeline_s,
            sum_s=sum_s,
            latency_s=rounds[0],
            period_s=period,
            limit=limit,
            computing_s=tuple(computing),
            sent_bytes=tuple((float(sent[0][cut]), float(sent[1][cut])) for cut in bounds[1:-1]),
            in_flight=tuple(in_flight),
            bounds=tuple(bounds),
        )

    def missing(self, cluster: Cluster) -> str:
        """Return what keeps the model from fitting, in words with numbers."""
        ranges, budget = self.ranges[1], self.device.memory_bytes / MEMORY_MARGIN
        last = len(ranges.seconds_PP) - 1
        need, offered = float(ranges.fixed_bytes_PP[0, last]), budget * cluster.count
        if need > offered:
            return f"needs {need / 1e9:,.0f} GB, {cluster.count} cards hold {offered / 1e9:,.0f} GB of it"
        parts = np.diagonal(ranges.fixed_bytes_PP + ranges.flight_bytes_PP, 1)
        largest = float(parts.max())
        if largest > budget:
            held = f"a card holds {budget / 1e9:.1f} GB of it"
            return f"the largest part between two cuts needs {largest / 1e9:.1f} GB, {held}"
        return f"no partition over {cluster.count} cards of {budget / 1e9:.1f} GB holds {need / 1e9:,.0f} GB"

    def one_sample_s(self, found: Found, cluster: Cluster, codec: Codec) -> float:
        """Return the seconds of a single sample through a plan's stages, in training there and back."""
        ranges, inner = self.ranges[1], found.bounds[1:-1]
        sent, packing = _packed(ranges, codec, self.device.memory_bytes_per_s)
        both = 2 if self.costs.task == "training" else 1
        return sum(float(ranges.seconds_PP[start, stop]) for start, stop in pairwise(found.bounds)) + sum(
            float((sent[0][cut] + sent[1][cut]) / cluster.bytes_per_s + 2 * packing[cut]) + both * cluster.latency_s
            for cut in inner
        )

    def _end(self, cluster: Cluster, codec: Codec, pipelines: int, bounds: list[int]) -> tuple[float, float]:
        """Return the seconds of summing gradients and of reporting and updating.

        A ring all-reduce is 2 (P - 1) rounds of 1 / P of the bytes (Patarasuk and Yuan 2009). What Top-K keeps differs
        from machine to machine, so its sums are gathered whole: P - 1 rounds of all that each one sends. The shorter
        of the two is taken.
        """
        weights = self.ranges[1].weight_bytes_P
        held = max(float(weights[stop] - weights[start]) for start, stop in pairwise(bounds))
        others = pipelines - 1
        ring_s = 2 * others * (held / pipelines / cluster.bytes_per_s + cluster.latency_s)
        gather_s = others * (codec.sent_bytes(held) / cluster.bytes_per_s + cluster.latency_s)
        sum_s = min(ring_s, gather_s)
        if len(bounds) > 2 and self.costs.tied_bytes:
            sum_s += self.costs.tied_bytes / cluster.bytes_per_s + cluster.latency_s
        passes = 2 + 2 * ADAM_COPIES + 3  # as `estimator.update_s`
        return sum_s, passes * held / self.device.memory_bytes_per_s + 2 * cluster.latency_s


def _packed(ranges: Ranges, codec: Codec, memory_bytes_per_s: float) -> tuple[tuple[Floats, Floats], Floats]:
    """Return the bytes that are sent at each position, both ways, and the seconds that packing takes on either side."""
    sides = ranges.forward_bytes_P, ranges.gradient_bytes_P
    sent = [np.asarray([codec.sent_bytes(float(each)) for each in side]) for side in sides]
    # Per side of a boundary: packing one of the two tensors, and unpacking the other.
    seconds = np.zeros(len(sent[0]))
    for each in range(len(seconds)):
        whole = max(float(side[each]) for side in sides)
        seconds[each] = codec.encode_s(whole, _ANY) + codec.decode_s(whole, _ANY)
    return (sent[0], sent[1]), seconds


def _in_flight(computing: list[float], hops: list[float], most: list[int], period: float) -> list[int]:
    """Return the microbatches that each stage holds: enough to hide every hop, less of all where `most` is less."""
    last = len(computing) - 1
    wanted = [1] * (last + 1)
    for place in range(last - 1, -1, -1):
        cycle = computing[place] + computing[place + 1] + hops[place]
        wanted[place] = wanted[place + 1] + max(1, math.ceil(cycle / period * 0.95) - 1)
    share = min(1.0, *(limit / want for limit, want in zip(most, wanted, strict=True)))
    return [max(1, int(want * share * (1 + 1e-9))) for want in wanted]


def _waiting_s(computing: list[float], hops: list[float], held: list[int]) -> float:
    """Return the seconds between microbatches that those in flight allow.

    In 1F1B a stage's forward i + w follows its backward i. Between two stages that hold w and w' that makes a cycle of
    all computing and ways from the one to the other and back, once in w - w' + 1 microbatches.
    """
    # until[k]: from the first stage through stage k; before[k]: up to the start of stage k.
    until = np.cumsum(computing) + np.concatenate([[0.0], np.cumsum(hops)])
    before = until - np.asarray(computing)
    cycles = until[None] - before[:, None]
    rounds = np.asarray(held)[:, None] - np.asarray(held)[None] + 1
    return float(np.where(np.tri(len(held), k=-1, dtype=bool), 0.0, cycles / np.maximum(rounds, 1)).max())


def _bounds(seconds: Floats, busy: Floats, fits: Flags, room: Floats, held: Sequence[float]) -> list[int] | None:
    """Return the positions of the partition whose largest share of machine or link is least, None if there is none.

    `held` are the microbatches that each stage must have `room` for, never more than the stage before: so the longest
    stage that fits is the best one. There are at most as many stages.
    """
    last = len(seconds) - 1

    def reached(limit: float) -> list[int] | None:
        allowed = (busy <= limit) & np.isfinite(busy)
        allowed[last] = True
        possible = fits & (seconds <= limit) & allowed[None]
        bounds = [0]
        for microbatches in held:
            stops = np.flatnonzero(possible[bounds[-1]] & (room[bounds[-1]] >= microbatches))
            if not len(stops):
                return None
            bounds.append(int(stops[-1]))
            if bounds[-1] == last:
                return bounds
        return None

    found = reached(np.inf)
    if found is None:
        return None
    slowest_link = float(busy[np.isfinite(busy)].max(initial=0.0))
    low, high = 0.0, max(slowest_link, *(float(seconds[a, b]) for a, b in pairwise(found)))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (tried := reached(middle)) is None:
            low = middle
        else:
            high, found = middle, tried
    return found
