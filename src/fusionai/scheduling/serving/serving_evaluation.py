"""How many tokens a placement gives: flows, and the time that tokens are on their way, agreed with each other.

What a machine can pass on depends on the time that its sequences spend elsewhere (`estimator`), and that on the flows.
Both are computed in turns. Array suffixes: M = machines that hold a share, in the order of the flow; K = kinds of
devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusionai.errors import PlacementError
from fusionai.scheduling.links import Floats
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.serving.flow import SINK, SOURCE, Arc, most_flow
from fusionai.scheduling.serving.serving_estimator import TABLES, RangeTimes, range_times
from fusionai.scheduling.serving.serving_task import ServingTask
from fusionai.units.byte_counts import bytes_text

_ROUNDS = 8
_STEADY = 1e-3
"""Change of the flow between two rounds that is called agreement."""


@dataclass(frozen=True, slots=True, order=True)
class HeldRange:
    """Segments [first, last) on a machine. Sorted as flows go: by end, then start."""

    last: int
    first: int
    machine: int


@dataclass(frozen=True, slots=True, eq=False)
class EvaluatedPlacement:
    """A placement's flows. Rates are of generated tokens."""

    shares: tuple[HeldRange, ...]
    tokens_per_s: float
    token_s: float
    """Between two tokens of a sequence, mean over all."""
    through_M: Floats
    capacity_M: Floats
    own_s_M: Floats
    arcs: tuple[Arc, ...]
    """Tails and heads are places in `shares`."""
    flows: tuple[float, ...]
    elsewhere_s_M: Floats

    @property
    def used(self) -> tuple[HeldRange, ...]:
        """Return the shares that some flow passes."""
        least = 1e-6 * self.tokens_per_s
        return tuple(share for share, flow in zip(self.shares, self.through_M, strict=True) if flow > least)


class Evaluator:
    """Rates of placements of one task; everything that does not depend on the placement is costed once."""

    def __init__(self, task: ServingTask) -> None:
        """Cost the model on every kind of device among the members.

        Raises PlacementError for a profile without rates, and for an owner whose machine cannot hold what is pinned.
        """
        self.task = task
        kinds = list(dict.fromkeys(_key(member.device) for member in task.members))
        devices = {_key(member.device): member.device for member in task.members}
        self.kind_of = np.asarray([kinds.index(_key(member.device)) for member in task.members])
        tables = [range_times(task.model, devices[kind], task.load, task.precision) for kind in kinds]
        self.times = _stacked(tables)
        """(K, P, P) tables."""
        self.owner = _owner_times(task) if task.private else None
        self.owner_s = 0.0 if self.owner is None else float(self.owner.pass_s(1.0))
        carried = task.load.carried_tokens * task.model.crossing_bytes_P
        # The gateway sends a prompt's tokens once and takes each generated one.
        with np.errstate(divide="ignore"):
            self.link_tokens_NN = [task.bandwidth_NN / size for size in carried]
        self.least_s_S = np.diagonal(self.times.pass_s(1.0).min(axis=0), offset=1)
        """Least time of each segment on any member, alone."""

    @cached_property
    def owner_rate(self) -> float:
        """Return the tokens per second that the owner's machine can embed and sample."""
        return math.inf if self.owner is None else float(self.owner.tokens_per_s(np.asarray(0.0)))

    def hop_s(self, source: int, target: int, position: int) -> float:
        """Return the seconds of a decode token's way over an empty link."""
        task = self.task
        speed = task.bandwidth_NN[source, target]
        if speed <= 0:
            return math.inf
        return float(task.delay_NN[source, target] + task.model.crossing_bytes_P[position] / speed)

    def arcs(self, shares: Sequence[HeldRange]) -> list[Arc]:
        """Return the ways that tokens can take between shares in the order of flow."""
        task, gateway = self.task, self.task.gateway
        found = []

        def add(tail: int, head: int, source: int, target: int, position: int) -> None:
            capacity = float(self.link_tokens_NN[position][source, target])
            if capacity > 0:
                found.append(Arc(tail, head, capacity, self.hop_s(source, target, position)))

        for place, share in enumerate(shares):
            if share.first == task.front:
                add(SOURCE, place, gateway, share.machine, task.front)
            if share.last == task.back:
                add(place, SINK, share.machine, gateway, task.back)
                continue
            for other in range(place + 1, len(shares)):
                taker = shares[other]
                if taker.first <= share.last < taker.last:
                    add(place, other, share.machine, taker.machine, share.last)
        return found

    def picked(self, shares: Sequence[HeldRange]) -> RangeTimes:
        """Return the costs of shares as arrays."""
        machines = np.asarray([share.machine for share in shares])
        first, last = (np.asarray([getattr(share, name) for share in shares]) for name in ("first", "last"))
        return self.times.at(self.kind_of[machines], first, last)

    def evaluate(self, placement: Sequence[HeldRange], *, rounds: int = _ROUNDS) -> EvaluatedPlacement | None:
        """Return what a placement gives under full load, None if nothing."""
        shares = sorted(placement)
        if not shares:
            return None
        arcs, times = self.arcs(shares), self.picked(shares)
        own = times.pass_s(1.0)
        rest = _elsewhere(shares, arcs, None, own, self.owner_s)
        found: EvaluatedPlacement | None = None
        for turn in range(rounds):
            flowing = self._flowing(shares, arcs, times, own, rest)
            if flowing is None:
                return found
            settled = found is not None and abs(flowing.tokens_per_s / found.tokens_per_s - 1) < _STEADY
            found = flowing
            if settled:
                break
            own = np.where(np.isfinite(found.own_s_M), found.own_s_M, own)
            rest = (rest + found.elsewhere_s_M) / 2 if turn else found.elsewhere_s_M
        return found

    def ceiling(self, placement: Sequence[HeldRange]) -> float:
        """Return what no routing over a placement can exceed: tokens are elsewhere for the least time possible."""
        shares = sorted(placement)
        arcs, times = self.arcs(shares), self.picked(shares)
        alone = times.pass_s(1.0)
        # A request may enter a share in its middle, so only what follows its start can be counted on.
        least = np.asarray([self._least_inside(share, shares) for share in shares])
        rest = _elsewhere(shares, arcs, None, np.minimum(least, alone), self.owner_s, least=True)
        capacities = times.tokens_per_s(rest, least=True)
        flows = most_flow(list(capacities), list(alone), arcs)
        total = sum(flow for arc, flow in zip(arcs, flows, strict=True) if arc.head == SINK)
        return min(total, self.owner_rate)

    def _least_inside(self, share: HeldRange, shares: Sequence[HeldRange]) -> float:
        """Return the least time of a pass of a share, for requests that enter it as late as they can."""
        latest = max((other.last for other in shares if share.first <= other.last < share.last), default=share.first)
        kind = self.kind_of[share.machine]
        return float(self.times.at(kind, latest, share.last).pass_s(1.0))

    def _flowing(
        self, shares: list[HeldRange], arcs: list[Arc], times: RangeTimes, own: Floats, rest: Floats
    ) -> EvaluatedPlacement | None:
        capacity = times.tokens_per_s(rest)
        flows = most_flow(list(capacity), list(own), arcs)
        total = sum(flow for arc, flow in zip(arcs, flows, strict=True) if arc.head == SINK)
        if total <= 0:
            return None
        through = np.zeros(len(shares))
        for arc, flow in zip(arcs, flows, strict=True):
            if arc.head != SINK:
                through[arc.head] += flow
        if total > self.owner_rate:
            flows = [flow * self.owner_rate / total for flow in flows]
            through, total = through * self.owner_rate / total, self.owner_rate
        own = times.own_s(through)
        elsewhere = _elsewhere(shares, arcs, flows, own, self.owner_s)
        used = through > 1e-6 * total
        token_s = float(np.average((own + elsewhere)[used], weights=through[used]))
        return EvaluatedPlacement(
            tuple(shares), total, token_s, through, capacity, own, tuple(arcs), tuple(flows), elsewhere
        )


def _elsewhere(
    shares: Sequence[HeldRange],
    arcs: Sequence[Arc],
    flows: Sequence[float] | None,
    own_s: Floats,
    owner_s: float,
    *,
    least: bool = False,
) -> Floats:
    """Return the time that a token spends outside each machine in a round: by the flows, or on the quickest way.

    Machines that no flow passes have the quickest way, too.
    """
    count = len(shares)
    before, after = [math.inf] * count, [math.inf] * count
    mean_before, mean_after = [0.0] * count, [0.0] * count
    into, out_of = [0.0] * count, [0.0] * count
    leaving: list[list[tuple[Arc, float]]] = [[] for _ in range(count)]
    for place, arc in enumerate(arcs):
        flow = 0.0 if flows is None else flows[place]
        if arc.tail == SOURCE:
            before[arc.head] = min(before[arc.head], arc.cost_s)
            into[arc.head] += flow
            mean_before[arc.head] += flow * arc.cost_s
        else:
            leaving[arc.tail].append((arc, flow))
    own = [float(each) if math.isfinite(each) else 0.0 for each in own_s]
    for place in range(count):
        if into[place] > 0:
            mean_before[place] /= into[place]
        for arc, flow in leaving[place]:
            if arc.head != SINK:
                before[arc.head] = min(before[arc.head], before[place] + own[place] + arc.cost_s)
                into[arc.head] += flow
                mean_before[arc.head] += flow * (mean_before[place] + own[place] + arc.cost_s)
    for place in reversed(range(count)):
        for arc, flow in leaving[place]:
            following, mean = (
                (0.0, 0.0)
                if arc.head == SINK
                else (own[arc.head] + after[arc.head], own[arc.head] + mean_after[arc.head])
            )
            after[place] = min(after[place], arc.cost_s + following)
            out_of[place] += flow
            mean_after[place] += flow * (arc.cost_s + mean)
        if out_of[place] > 0:
            mean_after[place] /= out_of[place]
    quickest = np.asarray(before) + np.asarray(after)
    if flows is None or least:
        return np.asarray(quickest + owner_s)
    flowing = np.asarray([min(pair) for pair in zip(into, out_of, strict=True)]) > 0
    mean = np.asarray(mean_before) + np.asarray(mean_after)
    return np.asarray(np.where(flowing, mean, quickest) + owner_s)


def _key(device: object) -> str:
    """Return what tells kinds of devices apart."""
    return repr(device)


def _stacked(tables: Sequence[RangeTimes]) -> RangeTimes:
    return RangeTimes(
        output_tokens=tables[0].output_tokens,
        decode_share=tables[0].decode_share,
        **{name: np.stack([getattr(table, name) for table in tables]) for name in TABLES},
    )


def _owner_times(task: ServingTask) -> RangeTimes:
    """Return the costs of embedding and head on the owner's machine, as if of one range."""
    assert task.owner is not None
    table = range_times(task.model, task.owner.device, task.load, task.precision)
    front, back = table.at(0, 1), table.at(task.back, task.back + 1)
    summed = {name: getattr(front, name) + getattr(back, name) for name in TABLES}
    need, offered = float(summed["fixed_bytes"]) * MEMORY_MARGIN, task.owner.device.memory_bytes
    if need > offered:
        raise PlacementError(
            f"embedding and head of {task.model.name} need {bytes_text(need)} on the owner's machine, {task.owner.name}"
            f", which offers {bytes_text(offered)}, {bytes_text(need - offered)} too little; raise the memory offered, "
            "or serve with private = false if the compnodes may see the tokens"
        )
    summed["sequences"] = np.asarray(np.inf)
    return RangeTimes(output_tokens=task.load.output_tokens, decode_share=task.load.decode_share, **summed)
