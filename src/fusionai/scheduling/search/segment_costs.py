"""What a graph costs on each machine of a pool, in tables that any chain of machines can be reckoned from.

Array suffixes: N = machines (members, then the owner), D = machines of one chain, S = segments, P = S + 1 positions,
E = D + 1 (a chain's machines, then the owner).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fusionai.graph.cost import StageCost
from fusionai.scheduling.estimator import backward_s, forward_s, heap_microbatches
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.partition import NO_LIMIT, Line
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.clusters import near_clusters
from fusionai.scheduling.segments import MEMORY_MARGIN, Segments
from fusionai.scheduling.stage_costs import TrainedWeights
from fusionai.scheduling.worked_pipeline import PipelineChoice


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that leaves its segment: makers and takers count all segments, the owner's among them."""

    value: str
    maker: int
    taker: int
    size_bytes: int
    gradient: bool


@dataclass(frozen=True, eq=False)
class SegmentCosts:
    """The graph in segments, and each machine's seconds on each of them."""

    problem: TrainingProblem
    segments: Segments
    all_costs: tuple[StageCost, ...]
    """Costs of all segments, the owner's among them."""
    crossings: tuple[Crossing, ...]
    trained: TrainedWeights
    """Where the trained weights are, by segment, the owner's among them."""
    forward_NS: Floats
    backward_NS: Floats
    """Seconds of computing, the cost of starting operators apart."""
    forward_starts_NS: Floats
    backward_starts_NS: Floats
    deferred_NS: Floats
    additive_N: Floats
    """1 where starting operators adds to computing, 0 where the larger of both counts (`estimator.pass_s`)."""
    round_trips: dict[bytes, tuple[Floats, Floats]] = field(default_factory=dict)
    """What `rings` found for links between clusters."""
    _most_weight_bytes: dict[tuple[int, ...], float] = field(default_factory=dict)

    @property
    def positions(self) -> tuple[int, ...]:
        """Return the node positions considered; the ends are those of what may be distributed."""
        return self.segments.positions

    @property
    def count(self) -> int:
        """Return the number S of segments that may be distributed: no chain has more machines."""
        return len(self.positions) - 1

    @property
    def before(self) -> int:
        """Return how many segments the owner has before the others: 0 or 1."""
        return len(self.segments.outer) - self.segments.outer_after

    @cached_property
    def whole_s(self) -> Floats:
        """Return, by machine, the seconds of one microbatch if the machine did all that may be distributed."""
        parts = [
            additive * (computing + starts) + (1 - additive) * np.maximum(computing, starts)
            for computing, starts, additive in (
                (self.forward_NS.sum(1), self.forward_starts_NS.sum(1), self.additive_N),
                (self.backward_NS.sum(1), self.backward_starts_NS.sum(1), self.additive_N),
            )
        ]
        return np.asarray(parts[0] + parts[1])

    @cached_property
    def owner_s(self) -> float:
        """Return the seconds of one microbatch in the owner's own stages."""
        owner = self.problem.owner
        if owner is None:
            return 0.0
        precision = self.problem.precision
        costs = self.segments.outer
        return sum(forward_s(c, owner.device, precision) + backward_s(c, owner.device, precision) for c in costs)

    @cached_property
    def owner_after_s(self) -> float:
        """Return the seconds of one microbatch in the owner's last stage, if it has one after the others."""
        owner, costs = self.problem.owner, self.segments.outer[self.before :]
        if owner is None:
            return 0.0
        precision = self.problem.precision
        return sum(forward_s(c, owner.device, precision) + backward_s(c, owner.device, precision) for c in costs)

    @cached_property
    def _until_NP(self) -> tuple[Floats, ...]:
        """Return seconds of all segments before each position: forward, backward, their starts, and deferred."""
        tables = self.forward_NS, self.backward_NS, self.forward_starts_NS, self.backward_starts_NS, self.deferred_NS
        return tuple(np.concatenate([np.zeros((len(each), 1)), np.cumsum(each, axis=1)], axis=1) for each in tables)

    @cached_property
    def until_s(self) -> Floats:
        """Return (N, S): seconds of computing of both passes of all segments up to each, that one included."""
        return np.asarray(np.cumsum(self.forward_NS + self.backward_NS, axis=1))

    def stage_s(self, machines: Indices, bounds: Indices) -> tuple[Floats, Floats]:
        """Return, by stage, the seconds of both passes, and of the backward those after the gradients have left.

        Shapes (..., M) for machines and (..., M + 1) for bounds: many chains may be asked for at once.
        """
        start, stop = bounds[..., :-1], bounds[..., 1:]
        forward, backward, starts, back_starts, deferred = (
            until[machines, stop] - until[machines, start] for until in self._until_NP
        )
        if self.additive_N[machines].any():
            additive = self.additive_N[machines] > 0
            forward = np.where(additive, forward + starts, np.maximum(forward, starts))
            backward = np.where(additive, backward + back_starts, np.maximum(backward, back_starts))
        else:
            forward, backward = np.maximum(forward, starts), np.maximum(backward, back_starts)
        return forward + backward, np.minimum(deferred, backward)

    @cached_property
    def budget_bytes(self) -> Floats:
        """Return, by machine, what stages may take there by the estimate."""
        return np.asarray([each.device.memory_bytes for each in self.problem.machines]) / MEMORY_MARGIN

    @cached_property
    def heap_N(self) -> Floats:
        """Return, by machine, the microbatches that its allocator holds besides those in flight."""
        return np.asarray([heap_microbatches(each.device) for each in self.problem.machines], dtype=np.float64)

    def range_s(self, machines: Indices) -> Floats:
        """Return (D, P, P): seconds of both passes of each range on each machine; inf where a range is empty."""
        additive = self.additive_N[machines][:, None, None]
        total = np.zeros((len(machines), self.count + 1, self.count + 1))
        for computing, starts in (
            (self.forward_NS, self.forward_starts_NS),
            (self.backward_NS, self.backward_starts_NS),
        ):
            work_DPP, starts_DPP = _ranges(computing[machines]), _ranges(starts[machines])
            total += np.where(additive > 0, work_DPP + starts_DPP, np.maximum(work_DPP, starts_DPP))
        total[:, np.tri(self.count + 1, dtype=bool)] = np.inf
        return total

    def hops(self, machines: Indices, position_bytes: tuple[Floats, Floats], sharing: float) -> tuple[Floats, Floats]:
        """Return (E, E, ...): seconds there and back, and the larger of those that a link is busy, by crossing bytes.

        `sharing` says how many times slower the owner's links are, other pipelines using them too.
        """
        problem = self.problem
        owner = problem.owner_index
        around = np.append(machines, owner if owner is not None and problem.pinned else machines[0])
        out = problem.bandwidths(around[:, None], around[None])
        if owner is not None and problem.pinned:
            out = out.copy()
            out[-1] /= sharing
            out[:, -1] /= sharing
        delay = problem.delays(around[:, None], around[None])
        np.fill_diagonal(out, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            forward = np.nan_to_num(position_bytes[0] / out[:, :, None], nan=0.0, posinf=np.inf)
            gradient = np.nan_to_num(position_bytes[1] / out.T[:, :, None], nan=0.0, posinf=np.inf)
        # Without bytes nothing is sent, and so nothing is delayed.
        hop = forward + gradient + delay[:, :, None] * (position_bytes[0] > 0)
        hop += delay.T[:, :, None] * (position_bytes[1] > 0)
        hop[out == 0] = np.inf
        if not problem.pinned:
            hop[-1], hop[:, -1] = 0.0, 0.0
            forward[-1], forward[:, -1], gradient[-1], gradient[:, -1] = 0.0, 0.0, 0.0, 0.0
        return hop, np.maximum(forward, gradient)

    @cached_property
    def near_clusters(self) -> list[Indices]:
        """Return clusters of candidates that are near each other, by what a typical cut sends."""
        inner = slice(1, -1) if self.count > 1 else slice(None)
        typical = float(np.median(self.segments.forward_bytes_P[inner]))
        return near_clusters(self.problem, self.problem.candidates, typical)

    @cached_property
    def cluster_N(self) -> Indices:
        """Return, by machine, the number of its cluster of near machines; -1 for who is no candidate."""
        found = np.full(len(self.problem.machines), -1, dtype=np.int64)
        for number, each in enumerate(self.near_clusters):
            found[each] = number
        return found

    @cached_property
    def kind_N(self) -> Indices:
        """Return a number by machine, the same for those that are as fast in everything."""
        tables = self.forward_NS, self.backward_NS, self.forward_starts_NS, self.backward_starts_NS
        rows = np.concatenate([*tables, self.additive_N[:, None]], axis=1)
        return np.asarray(np.unique(rows, axis=0, return_inverse=True)[1].ravel(), dtype=np.int64)

    @property
    def tied(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return the bytes of each weight that several segments use, and these segments (all of them counted)."""
        return self.trained.tied

    @property
    def single_bytes(self) -> Floats:
        """Return, by segment (all of them counted), the bytes of weights that no other segment uses."""
        return self.trained.single_bytes

    @cached_property
    def counted_bytes(self) -> Floats:
        """Return, by segment (all of them counted), the bytes of weights, one that several use in the first of them."""
        found = self.single_bytes.copy()
        for size, parts in self.tied:
            found[parts[0]] += size
        return found

    @cached_property
    def weights_P(self) -> Floats:
        """Return the bytes of weights that train in all segments before each position, one used in several once."""
        size_S = self.counted_bytes[self.before : self.before + self.count]
        return np.concatenate([[0.0], np.cumsum(size_S)])

    def stage_weight_bytes(self, bounds: Indices) -> Floats:
        """Return, by stage, the bytes of weights that train, a tied one in each stage that uses it.

        Shape (..., M) for bounds of shape (..., M + 1), as in `stage_s`.
        """
        start, stop = bounds[..., :-1], bounds[..., 1:]
        found = self.weights_P[stop] - self.weights_P[start]
        for size, parts in self.tied:
            first, *others = (part - self.before for part in parts)
            for part in others:
                with_first = (start <= first) & (first < stop)
                found = found + size * ((start <= part) & (part < stop) & ~with_first)
        return np.asarray(found)

    def most_weight_bytes(self, bounds: tuple[int, ...]) -> float:
        """Return the bytes of weights that train in the stage that has most of them."""
        if bounds not in self._most_weight_bytes:
            self._most_weight_bytes[bounds] = float(self.stage_weight_bytes(np.asarray(bounds)).max())
        return self._most_weight_bytes[bounds]

    def line(
        self,
        machines: Indices,
        microbatches: int,
        *,
        sharing: float = 1.0,
        sum_s_per_byte: float = 0.0,
        budget_bytes: Floats | None = None,
        in_flight_limit: int = NO_LIMIT,
        hide_deferred: bool = True,
    ) -> Line:
        """Return the partition solver's numbers for a chain's machines.

        `sum_s_per_byte` are seconds of summing gradients at the end of the step for each byte that a machine holds;
        a stage is charged for its part of them with every microbatch, so that weights are divided as work is.
        `budget_bytes`: by machine of the chain, what its stages may take; None: what its memory and the margin allow.

        With `hide_deferred`, what a stage computes after its gradients have left delays no microbatch. That is so
        except for the last one of a step: its stages end with it. So where microbatches are few the other numbers may
        find more.
        """
        segments = self.segments
        summing_PP = sum_s_per_byte / microbatches * (self.weights_P[None] - self.weights_P[:, None])
        kinds, kind_D = np.unique(self.kind_N[machines], return_inverse=True)
        alike = np.asarray([machines[np.flatnonzero(kind_D == kind)[0]] for kind in range(len(kinds))])
        seconds = self.range_s(alike)
        hidden = np.minimum(_ranges(self.deferred_NS[alike]), np.where(np.isfinite(seconds), seconds, 0.0))
        if not hide_deferred:
            hidden[:] = 0.0
        elif not self.before:
            hidden[:, 0] = 0.0  # nobody waits for the first stage's gradients
        hop, busy = self.hops(machines, (segments.forward_bytes_P, segments.gradient_bytes_P), sharing)
        return Line(
            seconds_DPP=(seconds + summing_PP)[kind_D],
            delay_s_DPP=(seconds - hidden)[kind_D],
            fixed_bytes_PP=segments.fixed_bytes_PP,
            flight_bytes_PP=segments.flight_bytes_PP,
            heap_microbatches_D=self.heap_N[machines],
            budget_bytes_D=self.budget_bytes[machines] if budget_bytes is None else budget_bytes,
            hop_s_EEP=hop,
            hop_busy_s_EEP=busy,
            microbatches=microbatches,
            outer_s=self.owner_s * sharing,
            outer_stages_after=segments.outer_after,
            in_flight_limit=in_flight_limit,
        )

    def choice(
        self,
        machines: Sequence[int],
        bounds: Sequence[int],
        microbatches: int,
        in_flight_limit: int,
        widest: int | None = None,
    ) -> PipelineChoice:
        """Return the pipeline of a chain, the owner's stages added; `bounds` are indices of `positions`."""
        problem, owner = self.problem, self.problem.owner_index
        last = len(problem.graph.nodes)
        ends = [self.positions[bound] for bound in bounds]
        before, after = ends[0] > 0, ends[-1] < last
        everyone = [int(each) for each in machines]
        if owner is not None:
            everyone = [*[owner] * before, *everyone, *[owner] * after]
        cuts = tuple(end for end in ends if 0 < end < last)
        return PipelineChoice(
            tuple(everyone), cuts, microbatches, in_flight_limit, in_flight_limit if widest is None else widest
        )


def _ranges(parts_DS: Floats) -> Floats:
    """Return sums over [i, j) as (D, P, P)."""
    total = np.concatenate([np.zeros((len(parts_DS), 1)), np.cumsum(parts_DS, axis=1)], axis=1)
    return np.asarray(np.maximum(total[:, None, :] - total[:, :, None], 0.0))
