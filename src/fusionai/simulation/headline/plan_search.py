"""The fastest plan for machines and links that are all alike: how many pipelines, stages, and samples in a microbatch.

Where nothing differs, every pipeline is cut alike. Numbers of pipelines, stages and samples are enumerated and compared
by closed formulas; the best few are for the simulator to decide (`fusionai.simulation.headline.simulated_pipelines`).
`fusionai.scheduling.planner` looks for the same among unlike machines; it plans training only, and lets each link of a
machine carry all that it can, where here they share the machine's one uplink.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np

from fusionai.scheduling.links import Floats
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.simulation.codecs import Codec
from fusionai.simulation.headline.card_clusters import Cluster
from fusionai.simulation.headline.costs import Costs, Ranges, ranges_of
from fusionai.simulation.headline.cutting import bounds_of, narrow_positions
from fusionai.simulation.headline.pace import CostLine, PipelinePace, pace, with_more_in_flight
from fusionai.simulation.headline.step_end_formulas import StepEndFormulas

BATCHES = (1, 2, 4, 8, 16, 32, 64)
_LIGHTER = 0.9
"""Share of the weights of a partition's heaviest stage that a stage may have in the next try: the slower the links, the
more the sum of its gradients counts against the period."""

_HEAVY = 2.0
"""Times an equal share of the weights, from where on lighter stages are tried: fewer stages have heavier ones."""

_LIGHTEST = 0.97
"""Nearer to the heaviest stage is not tried; where nothing fits, it is approached."""

_RANKED = 12
"""Plans that are handed on, each of another number of pipelines, stages or samples."""

_PROMISING = 1.15
"""Cuts are sought only for periods with which a step takes at most so many times the shortest so far: the formulas
leave out by how much tensors wait for each other on uplinks."""

_SMALL_SUM = 0.02
"""Share of a step from which on the sum of gradients is worth a longer period."""

_ANY = "any"
"""The peer whose memory bandwidth a codec of equal machines is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformPlan:
    """A plan of equal pipelines, and what it takes by closed formulas. Seconds of a step of `samples` samples."""

    pipelines: int
    stages: int
    batch: int
    """Samples of a microbatch."""
    microbatches: int
    """Microbatches of each pipeline in a step."""
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
    pace: PipelinePace
    """Seconds of each stage for a microbatch, and how many it holds."""
    sent_bytes: tuple[tuple[float, float], ...]
    """Forward and as gradients, packed, by boundary."""
    bounds: tuple[int, ...]
    """Bounds of the stages, as positions of the costs' line."""
    fits: bool
    """Whether memory was heeded."""

    @property
    def machines(self) -> int:
        """Return how many machines take part."""
        return self.pipelines * self.stages

    @property
    def busy_s(self) -> float:
        """Return the seconds for which all machines together compute."""
        return sum(self.pace.forward_s + self.pace.backward_s) * self.microbatches * self.pipelines


@dataclass(frozen=True, slots=True, eq=False)
class _Size:
    """Samples of a step and of a microbatch, and the bytes that one sends at each position, both ways."""

    samples: int
    batch: int
    sent: tuple[Floats, Floats]


class PlanSearch:
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
    ) -> UniformPlan | None:
        """Return the fastest plan by the formulas, None if nothing fits; see `ranked`."""
        return next(iter(self.ranked(cluster, codec, samples, memory=memory, batches=batches)), None)

    def ranked(
        self,
        cluster: Cluster,
        codec: Codec,
        samples: int,
        *,
        memory: bool = True,
        batches: Sequence[int] = BATCHES,
        keep: int = _RANKED,
    ) -> list[UniformPlan]:
        """Return the plans that are fastest by the formulas, best first, at most `keep`; none if nothing fits.

        Without `memory`, machines hold what falls to them, but pipelines are as long as equal shares of computing make
        them, and no more in number than all memory together has room for the model's copies.
        """
        best: list[UniformPlan] = []
        end = StepEndFormulas(self.costs, cluster, codec, self.ranges[1].weight_bytes_P)
        for batch in batches:
            if batch > samples:
                break
            line, sent = self._line(cluster, codec, batch, memory=memory)
            for stages in range(1, cluster.count + 1) if memory else (cluster.count,):
                worth_s = best[0].step_s * _PROMISING if best else math.inf
                size = _Size(samples, batch, sent)
                best = _distinct(best + list(self._tried(line, end, size, stages, worth_s, memory=memory)))[:keep]
        return best

    def variants(self, found: UniformPlan, cluster: Cluster, codec: Codec) -> Iterator[UniformPlan]:
        """Yield a plan, and the same with more microbatches in flight where there is memory for them."""
        yield found
        if self.costs.task == "training" and found.stages > 1:
            line, _ = self._line(cluster, codec, found.batch, memory=found.fits)
            for held in with_more_in_flight(line, found.bounds, found.pace):
                yield replace(found, pace=replace(found.pace, in_flight=held))

    def _line(
        self, cluster: Cluster, codec: Codec, batch: int, *, memory: bool
    ) -> tuple[CostLine, tuple[Floats, Floats]]:
        """Return the line of a microbatch, and the bytes that are sent at each position, both ways."""
        ranges = self.ranges[batch]
        sent, pack, unpack = _packed(ranges, codec)
        for each in (*sent, pack, unpack):
            each[[0, -1]] = 0.0
        training = self.costs.task == "training"
        return CostLine(
            forward_s_PP=ranges.forward_s_PP + unpack[:, None] + pack[None],
            backward_s_PP=ranges.backward_s_PP + (pack[:, None] + unpack[None] if training else 0.0),
            deferred_s_PP=ranges.deferred_s_PP,
            out_s_P=sent[0] / cluster.bytes_per_s,
            back_s_P=sent[1] / cluster.bytes_per_s,
            delay_s=(2 if training else 1) * cluster.latency_s,
            weight_bytes_P=ranges.weight_bytes_P,
            fixed_bytes_PP=ranges.fixed_bytes_PP,
            flight_bytes_PP=ranges.flight_bytes_PP,
            budget_bytes=self.device.memory_bytes / MEMORY_MARGIN if memory else math.inf,
        ), sent

    def _tried(
        self, line: CostLine, end: StepEndFormulas, size: _Size, stages: int, worth_s: float, *, memory: bool
    ) -> Iterator[UniformPlan]:
        """Yield plans of at most so many stages whose step may take less than `worth_s`."""
        training, count = memory and self.costs.task == "training", math.ceil(size.samples / size.batch)
        narrow = narrow_positions(line, end.cluster.count)
        if not memory:
            # Else links would let one machine take everything: the cheapest cuts are free, and the others closed.
            free = replace(line, out_s_P=np.zeros(len(narrow)), back_s_P=np.zeros(len(narrow)))
            ways = [(free, narrow)]
        else:
            ways = [(line, narrow)] + ([] if narrow.all() else [(line, np.ones(len(narrow), dtype=bool))])
        jumps = False
        for (each, allowed), most_more in product(ways, (math.inf, 1.0)):
            if not jumps and most_more == 1.0:
                # No stage holds more than that as it is.
                continue
            most_bytes, heaviest_bytes, lighter = math.inf, math.inf, _LIGHTER
            period_s = self._longest_period_s(line, end, size, stages, worth_s)
            while period_s > 0 and lighter < _LIGHTEST:
                bounds = bounds_of(
                    each,
                    stages,
                    allowed,
                    microbatches=count,
                    worth_s=period_s,
                    most_weight_bytes=most_bytes,
                    most_more=most_more,
                )
                if bounds is None and math.isinf(heaviest_bytes):
                    break
                if bounds is None:
                    lighter = math.sqrt(lighter)
                else:
                    plans = self._plans(line, end, size, bounds, memory=memory)
                    yield from plans
                    jumps = jumps or any(one - other > 1 for one, other in pairwise(plans[0].pace.in_flight))
                    if allowed is not narrow or not training or stages == 1:
                        break
                    if all(plan.sum_s < _SMALL_SUM * plan.step_s for plan in plans) and len(bounds) > 2:
                        break
                    heaviest_bytes = float(np.diff(line.weight_bytes_P[bounds]).max())
                most_bytes = min(lighter * heaviest_bytes, _HEAVY * float(line.weight_bytes_P[-1]) / stages)

    def _longest_period_s(
        self, line: CostLine, end: StepEndFormulas, size: _Size, stages: int, worth_s: float
    ) -> float:
        """Return the longest period with which a step of some number of pipelines may take less than `worth_s`."""
        most = max(1, min(end.cluster.count // stages, size.samples // size.batch))
        pipelines = np.arange(1, most + 1, dtype=np.int64)
        rounds = np.ceil(size.samples / (pipelines * size.batch)) - 1
        held_bytes = float(line.weight_bytes_P[-1]) / stages
        computing_s = float(line.forward_s_PP[0, -1] + line.backward_s_PP[0, -1] - line.deferred_s_PP[0, -1])
        least_s = computing_s + end.copies_s(pipelines, held_bytes) + end.update_s(held_bytes)
        with np.errstate(divide="ignore"):
            left_s = worth_s - least_s
            return float(np.where(rounds > 0, left_s / rounds, np.where(left_s > 0, np.inf, 0.0)).max())

    def _plans(
        self, line: CostLine, end: StepEndFormulas, size: _Size, bounds: Sequence[int], *, memory: bool
    ) -> list[UniformPlan]:
        """Return what a partition gives in the best two numbers of pipelines."""
        stages, samples, batch = len(bounds) - 1, size.samples, size.batch
        most = min(end.cluster.count // stages, math.ceil(samples / batch))
        if not memory:
            budget = self.device.memory_bytes / MEMORY_MARGIN
            copies = end.cluster.count * budget / float(self.ranges[batch].fixed_bytes_PP[0, -1])
            most = min(most, max(1, int(copies)))
        fewest = 1 if self.costs.task == "training" else most
        pipelines = np.arange(fewest, most + 1, dtype=np.int64)
        at, held_bytes = pace(line, bounds), float(np.diff(line.weight_bytes_P[list(bounds)]).max())
        counts = np.ceil(samples / (pipelines * batch)).astype(np.int64)
        pipeline_s = at.latency_s + (counts - 1) * at.period_s
        sum_s = end.sum_s(pipelines, bounds)
        step_s = pipeline_s + sum_s + end.update_s(held_bytes)
        return [
            UniformPlan(
                pipelines=int(pipelines[place]),
                stages=stages,
                batch=batch,
                microbatches=int(counts[place]),
                samples=samples,
                step_s=float(step_s[place]),
                pipeline_s=float(pipeline_s[place]),
                sum_s=float(sum_s[place]),
                latency_s=at.latency_s,
                period_s=at.period_s,
                limit="summing gradients" if sum_s[place] > pipeline_s[place] else at.limit,
                pace=at,
                sent_bytes=tuple((float(size.sent[0][cut]), float(size.sent[1][cut])) for cut in bounds[1:-1]),
                bounds=tuple(bounds),
                fits=memory,
            )
            for place in np.argsort(step_s, kind="stable")[:2].tolist()
        ]

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

    def one_sample_s(self, found: UniformPlan, cluster: Cluster, codec: Codec) -> float:
        """Return the seconds of a single sample through a plan's stages, in training there and back."""
        return pace(self._line(cluster, codec, 1, memory=False)[0], found.bounds).latency_s


def _distinct(found: list[UniformPlan]) -> list[UniformPlan]:
    """Return the best plan of each number of pipelines, stages and samples, best first."""
    best: dict[tuple[int, int, int], UniformPlan] = {}
    for each in sorted(found, key=lambda each: each.step_s):
        best.setdefault((each.pipelines, each.stages, each.batch), each)
    return list(best.values())


def _packed(ranges: Ranges, codec: Codec) -> tuple[tuple[Floats, Floats], Floats, Floats]:
    """Return the bytes that are sent at each position, both ways, and the seconds of packing and of unpacking there."""
    sides = ranges.forward_bytes_P, ranges.gradient_bytes_P
    sent = [np.asarray([codec.sent_bytes(float(each)) for each in side]) for side in sides]
    # Outputs and their gradients are as large as each other, or there are no gradients.
    whole = np.maximum(*sides).tolist()
    pack, unpack = ([seconds(each, _ANY) for each in whole] for seconds in (codec.encode_s, codec.decode_s))
    return (sent[0], sent[1]), np.asarray(pack), np.asarray(unpack)
