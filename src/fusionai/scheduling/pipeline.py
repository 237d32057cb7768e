"""How long a pipeline takes: the 1F1B schedule executed with predicted times.

Stages differ, links take time and carry one tensor after the other, and one machine may hold several stages (the
owner of a private job holds the first and the last). No closed formula covers that, so the schedule itself is
worked through: every pass starts when its machine is free and its tensors are there. Turns and priorities are those
of the training runtime (`training.schedule`): a stage takes backwards in order as their gradients come, and forwards in
order as long as fewer than `in_flight` microbatches are between the two, the forward first if both could run; a machine
with several stages that could run a pass takes a backward before a forward and a later stage before an earlier one.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Line: TypeAlias = tuple[str, Literal["up", "down"]]
"""A machine's uplink or downlink."""

_LinesTaken: TypeAlias = tuple[tuple[Line, float], tuple[Line, float]]
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
    link: tuple[str, str] | None
    """None within a machine."""
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
    line_busy_s: dict[Line, float]
    """The same of uplinks and downlinks, where links share them."""


class _Run:
    """One execution of the schedule. Lists by direction have what belongs to forwards first, then to backwards."""

    def __init__(self, stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> None:
        self.stages, self.microbatches = stages, microbatches
        self.in_flight = [stage.in_flight for stage in stages]
        count = len(stages)
        self.out: tuple[list[list[_Way]], ...] = ([[] for _ in stages], [[] for _ in stages])
        self.needed = [[0] * count, [0] * count]
        """Tensors that a pass needs, by direction and stage."""
        for edge in edges:
            ways = [(edge.source, edge.target, edge.forward_s, edge.forward_lines_s, False)]
            if edge.backward_s is not None:
                ways.append((edge.target, edge.source, edge.backward_s, edge.backward_lines_s, True))
            for source, target, seconds, lines_s, backward in ways:
                here, there = stages[source].machine, stages[target].machine
                link = None if here == there else (here, there)
                lines: _LinesTaken | None = None
                if link is not None and any(lines_s):
                    lines = ((here, "up"), lines_s[0]), ((there, "down"), lines_s[1])
                way = _Way(target, link, seconds, edge.delay_s, lines)
                self.out[backward][source].append(way)
                self.needed[backward][target] += 1
        self.missing = [[[number] * microbatches for number in self.needed[backward]] for backward in (0, 1)]
        self.ready_s = [[[0.0] * microbatches for _ in stages] for _ in (0, 1)]
        self.done = [[0] * count, [0] * count]
        """Passes begun, by direction and stage."""
        self.queued = [[False] * count, [False] * count]
        self.free_s = {stage.machine: 0.0 for stage in stages}
        self.busy_s = {stage.machine: 0.0 for stage in stages}
        self.link_free_s: dict[tuple[str, str], float] = defaultdict(float)
        self.link_busy_s: dict[tuple[str, str], float] = defaultdict(float)
        self.line_free_s: dict[Line, float] = defaultdict(float)
        self.line_busy_s: dict[Line, float] = defaultdict(float)
        # (start, forward after backward, earlier stage after later); the start is a lower bound.
        self.queue: list[tuple[float, bool, int]] = []

    def run(self) -> PipelineTimes:
        for stage in range(len(self.stages)):
            self._offer(stage)
        end_s, queue, free_s = 0.0, self.queue, self.free_s
        while queue:
            start_s, is_forward, minus_stage = heapq.heappop(queue)
            machine = self.stages[-minus_stage].machine
            if start_s < free_s[machine]:
                heapq.heappush(queue, (free_s[machine], is_forward, minus_stage))
                continue
            if not is_forward and self._forward_is_ready(-minus_stage, start_s):
                self.queued[1][-minus_stage] = False  # Offered again once the forward has run.
                continue
            passed_s = self._pass(-minus_stage, start_s, not is_forward)
            end_s = passed_s if passed_s > end_s else end_s
        if any(done < self.microbatches for done in self.done[1]):
            raise ValueError("the pipeline cannot finish: a stage waits for a later one, or may hold no microbatch")
        return PipelineTimes(end_s, self.busy_s, dict(self.link_busy_s), dict(self.line_busy_s))

    def _offer(self, stage: int) -> None:
        """Queue a stage's next passes, if everything that they need is on its way."""
        forwards, backwards = self.done[0][stage], self.done[1][stage]
        queued_forward, queued_backward = self.queued
        if not queued_backward[stage] and backwards < forwards and not self.missing[1][stage][backwards]:
            queued_backward[stage] = True
            heapq.heappush(self.queue, (self.ready_s[1][stage][backwards], False, -stage))
        if (
            not queued_forward[stage]
            and forwards < self.microbatches
            and forwards - backwards < self.in_flight[stage]
            and not self.missing[0][stage][forwards]
        ):
            queued_forward[stage] = True
            heapq.heappush(self.queue, (self.ready_s[0][stage][forwards], True, -stage))

    def _forward_is_ready(self, stage: int, now_s: float) -> bool:
        """Return whether a stage's forward, queued and so with room, has its tensors."""
        return self.queued[0][stage] and self.ready_s[0][stage][self.done[0][stage]] <= now_s

    def _pass(self, stage: int, start_s: float, backward: bool) -> float:
        # Planners spend most of their time here: comparisons instead of max(), and no attribute twice.
        times = self.stages[stage]
        done, link_free_s = self.done[backward], self.link_free_s
        index = done[stage]
        seconds = times.backward_s if backward else times.forward_s
        end_s = start_s + seconds
        self.free_s[times.machine] = end_s
        self.busy_s[times.machine] += seconds
        done[stage] = index + 1
        self.queued[backward][stage] = False
        sent_s = end_s
        if backward and times.deferred_s:
            sent_s = end_s - times.deferred_s
            sent_s = sent_s if sent_s > start_s else start_s
        for target, link, occupied_s, delay_s, lines in self.out[backward][stage]:
            arrival_s = sent_s
            if link is not None:
                free_s = link_free_s[link]
                free_s = free_s if free_s > sent_s else sent_s
                free_s = free_s + occupied_s if lines is None else self._on_lines(lines, free_s, occupied_s)
                link_free_s[link] = free_s
                self.link_busy_s[link] += occupied_s
                arrival_s = free_s + delay_s
            ready_s, missing = self.ready_s[backward][target], self.missing[backward][target]
            if arrival_s > ready_s[index]:
                ready_s[index] = arrival_s
            missing[index] -= 1
            if not missing[index]:
                self._offer(target)
        self._offer(stage)
        return end_s

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


@dataclass(frozen=True, slots=True)
class Round:
    """An executed schedule, from which the times of rounds of as many microbatches or more follow."""

    executed: int
    whole: PipelineTimes
    half: PipelineTimes | None
    """Of half as many microbatches; None where only a round of `executed` is asked for."""

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


def executed_round(stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> Round:
    """Execute one round of 1F1B over `stages` joined by `edges`, a long one not to its end.

    Raises ValueError when a stage may hold no microbatch in flight.
    """
    executed = executed_microbatches(stages, microbatches)
    half = None if executed == microbatches else _Run(stages, edges, executed // 2).run()
    return Round(executed, _Run(stages, edges, executed).run(), half)


def pipeline_times(stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> PipelineTimes:
    """Return the times of one round of microbatches; see `executed_round`."""
    return executed_round(stages, edges, microbatches).times(microbatches)
