"""How long a pipeline takes: the 1F1B schedule executed with predicted times.

Stages differ, links take time and carry one tensor after the other, and one machine may hold several stages (the
owner of a private job holds the first and the last). No closed formula covers that, so the schedule itself is
worked through: every pass starts when its machine is free and its tensors are there. Turns and priorities are those
of the training runtime (`training.schedule`): a stage takes backwards in order as their gradients come, and forwards in
order as long as fewer than `in_flight` microbatches are between the two, the forward first if both could run; a machine
with several stages that could run a pass takes a backward before a forward and a later stage before an earlier one.
"""

from __future__ import annotations

import copy
import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

SharedLine: TypeAlias = tuple[str, Literal["up", "down"]]
"""A machine's uplink or downlink."""

_LinesTaken: TypeAlias = tuple[tuple[SharedLine, float], tuple[SharedLine, float]]
"""The sender's uplink and the receiver's downlink, with the seconds that a tensor takes them."""

_LEAST_EXECUTED = 128
_EXECUTED_PER_STAGE = 4
"""Microbatches of a round that is executed to the end, at least, and for each stage or microbatch in flight, whichever
are more: after so many the pipeline runs evenly. A job may name many more, and a planner tries many plans."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One stage: its machine, and seconds per microbatch."""

    machine: str
    forward_s: float
    backward_s: float
    in_flight: int
    """Most microbatches between forward and backward, at least 1."""
    deferred_s: float = 0.0
    """The part of `backward_s` that is computed after the boundary gradients have left."""


@dataclass(frozen=True, slots=True)
class Edge:
    """Tensors of one microbatch from stage `source` to a later stage `target`, and their gradients back."""

    source: int
    target: int
    forward_s: float
    """Seconds that sending occupies the link, latency apart."""
    backward_s: float | None
    """The same for the gradients; None when none travel."""
    delay_s: float
    """One-way latency."""
    forward_lines_s: tuple[float, float] = (0.0, 0.0)
    """Seconds that sending occupies the source's uplink and the target's downlink, which all their links share."""
    backward_lines_s: tuple[float, float] = (0.0, 0.0)
    """The same of the gradients, of the target's uplink and the source's downlink."""


class _Way(NamedTuple):
    """Where a pass's tensors go."""

    target: int
    link: int
    """Number of the link; -1 within a machine."""
    seconds: float
    delay_s: float
    lines: _LinesTaken | None
    """The sender's uplink and the receiver's downlink, where they are shared, with the seconds that they take."""


@dataclass(frozen=True, slots=True)
class PipelineTimes:
    """What a round of microbatches takes."""

    makespan_s: float
    """From the first pass's start to the last pass's end."""
    busy_s: dict[str, float]
    """Compute seconds by machine."""
    link_busy_s: dict[tuple[str, str], float]
    """Seconds that each directed link is occupied."""
    line_busy_s: dict[SharedLine, float]
    """The same of uplinks and downlinks, where links share them."""


class _Run:
    """One execution of the schedule. Machines and links go by number.

    Planners spend much of their time here: lists instead of dictionaries, comparisons instead of max(), and nothing
    looked at that cannot have changed.
    """

    def __init__(self, stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> None:
        count = len(stages)
        self.stages, self.microbatches = stages, microbatches
        self.in_flight = [stage.in_flight for stage in stages]
        self.machines = list(dict.fromkeys(stage.machine for stage in stages))
        number = {machine: place for place, machine in enumerate(self.machines)}
        self.machine = [number[stage.machine] for stage in stages]
        self.links: dict[tuple[str, str], int] = {}
        # Of forwards first, then of backwards.
        self.out: tuple[list[list[_Way]], ...] = ([[] for _ in stages], [[] for _ in stages])
        for edge in edges:
            self._add_way(0, edge.source, edge.target, edge.forward_s, edge.delay_s, edge.forward_lines_s)
        for edge in edges:
            if edge.backward_s is not None:
                self._add_way(1, edge.target, edge.source, edge.backward_s, edge.delay_s, edge.backward_lines_s)
        needed = [Counter(way.target for ways in self.out[backward] for way in ways) for backward in (0, 1)]
        self.missing = [[[needed[backward][stage]] * microbatches for stage in range(count)] for backward in (0, 1)]
        """Tensors that passes still wait for, by direction, stage and microbatch."""
        self.ready_s = [[[0.0] * microbatches for _ in stages] for _ in (0, 1)]
        self.forwards, self.backwards = [0] * count, [0] * count
        """Passes begun, by stage."""
        self.forward_queued, self.backward_queued = [False] * count, [False] * count
        self.free_s, self.busy_s = [0.0] * len(self.machines), [0.0] * len(self.machines)
        self.link_free_s, self.link_busy_s = [0.0] * len(self.links), [0.0] * len(self.links)
        self.line_free_s: dict[SharedLine, float] = defaultdict(float)
        self.line_busy_s: dict[SharedLine, float] = defaultdict(float)
        # (start, forward after backward, earlier stage after later); the start is a lower bound.
        self.queue: list[tuple[float, bool, int]] = []
        self.end_s = 0.0
        self.refused: list[int] = []
        """Stages with a forward that `microbatches` did not allow."""

    def _add_way(
        self, backward: int, source: int, target: int, seconds: float, delay_s: float, lines_s: tuple[float, float]
    ) -> None:
        here, there = self.stages[source].machine, self.stages[target].machine
        link = -1 if here == there else self.links.setdefault((here, there), len(self.links))
        lines: _LinesTaken | None = None
        if link >= 0 and any(lines_s):
            lines = ((here, "up"), lines_s[0]), ((there, "down"), lines_s[1])
        self.out[backward][source].append(_Way(target, link, seconds, delay_s, lines))

    def halfway(self, microbatches: int) -> PipelineTimes:
        """Return the times of fewer microbatches, and be where that schedule parts from the one of all."""
        whole, self.microbatches = self.microbatches, microbatches
        for stage in range(len(self.stages)):
            self._offer_forward(stage)
        self._advance(pausing=True)
        other = self._copy()
        found = other.finished()
        self.microbatches = whole
        return found

    def finished(self) -> PipelineTimes:
        """Return the times of all microbatches, none of which need have begun."""
        offered = self.refused or range(len(self.stages))
        self.refused = []
        for stage in offered:
            self._offer_forward(stage)
        self._advance(pausing=False)
        if any(done < self.microbatches for done in self.backwards):
            raise ValueError("the pipeline cannot finish: a stage waits for a later one, or may hold no microbatch")
        return PipelineTimes(
            self.end_s,
            dict(zip(self.machines, self.busy_s, strict=True)),
            dict(zip(self.links, self.link_busy_s, strict=True)),
            dict(self.line_busy_s),
        )

    def _copy(self) -> _Run:
        other = copy.copy(self)
        other.missing = [[each.copy() for each in by_stage] for by_stage in self.missing]
        other.ready_s = [[each.copy() for each in by_stage] for by_stage in self.ready_s]
        for name in _CHANGING:
            setattr(other, name, getattr(self, name).copy())
        return other

    def _advance(self, *, pausing: bool) -> None:
        """Work the queue through, or if `pausing`, to the first stage that is refused a forward."""
        queue, free_s, machines = self.queue, self.free_s, self.machine
        forward_queued, forward_ready_s, forwards = self.forward_queued, self.ready_s[0], self.forwards
        while queue and not (pausing and self.refused):
            start_s, is_forward, minus_stage = heapq.heappop(queue)
            stage = -minus_stage
            until_s = free_s[machines[stage]]
            if start_s < until_s:
                heapq.heappush(queue, (until_s, is_forward, minus_stage))
                continue
            if not is_forward and forward_queued[stage] and forward_ready_s[stage][forwards[stage]] <= start_s:
                self.backward_queued[stage] = False  # Offered again once the forward, which has its tensors, has run.
            else:
                self._pass(stage, start_s, not is_forward)

    def _offer_forward(self, stage: int) -> None:
        """Queue a stage's next forward, if there is room for it and all that it needs is on its way."""
        index = self.forwards[stage]
        if self.forward_queued[stage] or index - self.backwards[stage] >= self.in_flight[stage]:
            return
        if index >= self.microbatches:
            self.refused.append(stage)
        elif not self.missing[0][stage][index]:
            self.forward_queued[stage] = True
            heapq.heappush(self.queue, (self.ready_s[0][stage][index], True, -stage))

    def _offer_backward(self, stage: int) -> None:
        """Queue a stage's next backward, if its forward has run and all that it needs is on its way."""
        index = self.backwards[stage]
        if not self.backward_queued[stage] and index < self.forwards[stage] and not self.missing[1][stage][index]:
            self.backward_queued[stage] = True
            heapq.heappush(self.queue, (self.ready_s[1][stage][index], False, -stage))

    def _pass(self, stage: int, start_s: float, backward: bool) -> None:
        machine, times = self.machine[stage], self.stages[stage]
        if backward:
            index, seconds = self.backwards[stage], times.backward_s
            self.backwards[stage], self.backward_queued[stage] = index + 1, False
        else:
            index, seconds = self.forwards[stage], times.forward_s
            self.forwards[stage], self.forward_queued[stage] = index + 1, False
        end_s = sent_s = start_s + seconds
        self.free_s[machine] = end_s
        self.busy_s[machine] += seconds
        if end_s > self.end_s:
            self.end_s = end_s
        if backward and times.deferred_s:
            sent_s = end_s - times.deferred_s
            sent_s = sent_s if sent_s > start_s else start_s
        ready_s, missing, link_free_s = self.ready_s[backward], self.missing[backward], self.link_free_s
        for target, link, occupied_s, delay_s, lines in self.out[backward][stage]:
            arrival_s = sent_s
            if link >= 0:
                free_s = link_free_s[link]
                free_s = free_s if free_s > sent_s else sent_s
                free_s = free_s + occupied_s if lines is None else self._on_lines(lines, free_s, occupied_s)
                link_free_s[link] = free_s
                self.link_busy_s[link] += occupied_s
                arrival_s = free_s + delay_s
            ready, lacking = ready_s[target], missing[target]
            if arrival_s > ready[index]:
                ready[index] = arrival_s
            lacking[index] -= 1
            if not lacking[index]:
                if backward:
                    self._offer_backward(target)
                else:
                    self._offer_forward(target)
        self._offer_forward(stage)
        self._offer_backward(stage)

    def _on_lines(self, lines: _LinesTaken, start_s: float, occupied_s: float) -> float:
        """Return when a tensor has left that takes a link from `start_s` on: link, uplink and downlink have carried it.

        Each line carries one tensor after the other; what finds the downlink taken waits in the network.
        """
        end_s = start_s + occupied_s
        for line, seconds in lines:
            self.line_free_s[line] = max(start_s, self.line_free_s[line]) + seconds
            self.line_busy_s[line] += seconds
            end_s = max(end_s, self.line_free_s[line])
        return end_s


_CHANGING = (
    "forwards",
    "backwards",
    "forward_queued",
    "backward_queued",
    "free_s",
    "busy_s",
    "link_free_s",
    "link_busy_s",
    "line_free_s",
    "line_busy_s",
    "queue",
    "refused",
)


@dataclass(frozen=True, slots=True)
class ExecutedRound:
    """An executed schedule, from which the times of rounds of as many microbatches or more follow."""

    executed: int
    whole: PipelineTimes
    half: PipelineTimes | None
    """Times of half as many microbatches; None where only a round of `executed` is asked for."""

    def times(self, microbatches: int) -> PipelineTimes:
        """Return the times of a round: once the pipeline is full, each microbatch takes as long as the one before."""
        if self.half is None:
            assert microbatches == self.executed
            return self.whole
        times = (microbatches - self.executed) / (self.executed - self.executed // 2)
        share = microbatches / self.executed
        return PipelineTimes(
            self.whole.makespan_s + times * (self.whole.makespan_s - self.half.makespan_s),
            {machine: busy_s * share for machine, busy_s in self.whole.busy_s.items()},
            {link: busy_s * share for link, busy_s in self.whole.link_busy_s.items()},
            {line: busy_s * share for line, busy_s in self.whole.line_busy_s.items()},
        )


def executed_microbatches(stages: Sequence[StageTimes], microbatches: int) -> int:
    """Return how many microbatches of a round are executed to the end."""
    deepest = max(len(stages), *(min(stage.in_flight, microbatches) for stage in stages))
    return min(microbatches, max(_LEAST_EXECUTED, _EXECUTED_PER_STAGE * deepest))


def executed_round(stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> ExecutedRound:
    """Execute one round of 1F1B over `stages` joined by `edges`, a long one not to its end.

    Raises ValueError when a stage may hold no microbatch in flight.
    """
    executed = executed_microbatches(stages, microbatches)
    run = _Run(stages, edges, executed)
    half = None if executed == microbatches else run.halfway(executed // 2)
    return ExecutedRound(executed, run.finished(), half)


def pipeline_times(stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> PipelineTimes:
    """Return the times of one round of microbatches; see `executed_round`."""
    return executed_round(stages, edges, microbatches).times(microbatches)
