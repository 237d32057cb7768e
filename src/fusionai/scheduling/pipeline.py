"""How long a pipeline takes: the 1F1B schedule executed with predicted times.

Stages differ, links take time and carry one tensor after the other, and one machine may hold several stages (the
owner of a private job holds the first and the last). No closed formula covers that, so the schedule itself is
worked through: every pass starts when its machine is free and its tensors are there. Turns and priorities are those
of the training runtime: each stage follows its 1F1B order, and a machine with a choice runs a backward before a
forward and a later stage before an earlier one.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_EXECUTED = 512
"""Microbatches of a round that is executed to the end: a strange job may name many, and a planner tries many plans."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One stage: its machine, and seconds per microbatch."""

    machine: str
    forward_s: float
    backward_s: float
    in_flight: int
    """Most microbatches between forward and backward; may not rise from a stage to one that it feeds."""
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


@dataclass(frozen=True, slots=True)
class PipelineTimes:
    """What a round of microbatches takes."""

    makespan_s: float
    """From the first pass's start to the last pass's end."""
    busy_s: dict[str, float]
    """Compute seconds by machine."""
    link_busy_s: dict[tuple[str, str], float]
    """Seconds that each directed link is occupied."""


def turn(position: int, microbatches: int, in_flight: int) -> tuple[bool, int]:
    """Return the 1F1B turn at `position` of a stage: whether it is a backward, and its microbatch."""
    warmup = min(microbatches, in_flight)
    if position < warmup:
        return False, position
    pair, second = divmod(position - warmup, 2)
    if pair < microbatches - warmup:
        return (False, warmup + pair) if second else (True, pair)
    return True, position - microbatches


class _Run:
    """One execution of the schedule."""

    def __init__(self, stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> None:
        self.stages, self.microbatches = stages, microbatches
        self.forward_edges: dict[int, list[Edge]] = defaultdict(list)
        self.backward_edges: dict[int, list[Edge]] = defaultdict(list)
        for edge in edges:
            self.forward_edges[edge.source].append(edge)
            if edge.backward_s is not None:
                self.backward_edges[edge.target].append(edge)
        incoming = {(False, stage): sum(edge.target == stage for edge in edges) for stage in range(len(stages))} | {
            (True, stage): sum(edge.source == stage and edge.backward_s is not None for edge in edges)
            for stage in range(len(stages))
        }
        self.incoming = incoming
        self.arrived: dict[tuple[bool, int, int], int] = defaultdict(int)
        self.ready_s: dict[tuple[bool, int, int], float] = defaultdict(float)
        self.position = [0] * len(stages)
        self.free_s: dict[str, float] = defaultdict(float)
        self.link_free_s: dict[tuple[str, str], float] = defaultdict(float)
        self.busy_s: dict[str, float] = defaultdict(float)
        self.link_busy_s: dict[tuple[str, str], float] = defaultdict(float)
        # (start, forward after backward, earlier stage after later, stage); the start is a lower bound.
        self.queue: list[tuple[float, bool, int]] = []

    def run(self) -> PipelineTimes:
        for stage in range(len(self.stages)):
            self._offer(stage)
        end_s = 0.0
        while self.queue:
            start_s, is_forward, minus_stage = heapq.heappop(self.queue)
            stage = -minus_stage
            machine = self.stages[stage].machine
            if start_s < self.free_s[machine]:
                heapq.heappush(self.queue, (self.free_s[machine], is_forward, minus_stage))
                continue
            end_s = max(end_s, self._pass(stage, start_s, backward=not is_forward))
        if any(position < 2 * self.microbatches for position in self.position):
            raise ValueError("the pipeline cannot finish: in_flight rises from a stage to a later one")
        return PipelineTimes(end_s, dict(self.busy_s), dict(self.link_busy_s))

    def _offer(self, stage: int) -> None:
        """Queue a stage's next pass if everything it needs is on its way."""
        position = self.position[stage]
        if position == 2 * self.microbatches:
            return
        backward, index = turn(position, self.microbatches, self.stages[stage].in_flight)
        if self.arrived[backward, stage, index] == self.incoming[backward, stage]:
            heapq.heappush(self.queue, (self.ready_s[backward, stage, index], not backward, -stage))

    def _pass(self, stage: int, start_s: float, *, backward: bool) -> float:
        times = self.stages[stage]
        _, index = turn(self.position[stage], self.microbatches, times.in_flight)
        seconds = times.backward_s if backward else times.forward_s
        end_s = start_s + seconds
        self.free_s[times.machine] = end_s
        self.busy_s[times.machine] += seconds
        self.position[stage] += 1
        if backward:
            for edge in self.backward_edges[stage]:
                sent_s = max(start_s, end_s - times.deferred_s)
                self._send(times.machine, edge.source, index, edge.backward_s or 0.0, edge.delay_s, sent_s, True)
        else:
            for edge in self.forward_edges[stage]:
                self._send(times.machine, edge.target, index, edge.forward_s, edge.delay_s, end_s, False)
        self._offer(stage)
        return end_s

    def _send(
        self, machine: str, to: int, index: int, seconds: float, delay_s: float, now_s: float, backward: bool
    ) -> None:
        receiver = self.stages[to].machine
        if receiver == machine:
            arrival_s = now_s
        else:
            link = machine, receiver
            self.link_free_s[link] = max(self.link_free_s[link], now_s) + seconds
            self.link_busy_s[link] += seconds
            arrival_s = self.link_free_s[link] + delay_s
        key = backward, to, index
        self.arrived[key] += 1
        self.ready_s[key] = max(self.ready_s[key], arrival_s)
        if turn(self.position[to], self.microbatches, self.stages[to].in_flight) == (backward, index):
            self._offer(to)


def pipeline_times(stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> PipelineTimes:
    """Return the times of one round of 1F1B over `stages` joined by `edges`.

    Long rounds are not executed to the end: once the pipeline is full, each further microbatch takes as long as the
    one before. Raises ValueError when the in-flight limits would lock the pipeline.
    """
    if microbatches <= _MOST_EXECUTED:
        return _Run(stages, edges, microbatches).run()
    half, whole = (_Run(stages, edges, count).run() for count in (_MOST_EXECUTED // 2, _MOST_EXECUTED))
    times = (microbatches - _MOST_EXECUTED) / (_MOST_EXECUTED - _MOST_EXECUTED // 2)
    share = microbatches / _MOST_EXECUTED
    return PipelineTimes(
        whole.makespan_s + times * (whole.makespan_s - half.makespan_s),
        {machine: busy_s * share for machine, busy_s in whole.busy_s.items()},
        {link: busy_s * share for link, busy_s in whole.link_busy_s.items()},
    )
