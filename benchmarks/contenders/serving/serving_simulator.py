"""Discrete events of serving: prompts and tokens go around the machines of a plan.

A request is admitted in the order of arrival, as soon as every machine of a route has room for its whole cache. Its
prompt passes the route once and gives the first token; each further token goes around again, from the gateway back to
it. A machine runs one pass at a time: a chunk of a prompt, or the decode tokens that wait, up to the plan's batch; in
turns while both do. Times are the estimator's. In private serving the owner's
machine runs passes for embedding and head, too.

Pure: no clock, no files, chance only in the requests.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from contenders.serving.request_router import Router
from contenders.serving.requests import Request
from contenders.serving.serving_report import MachineUse, ServingReport, spread_of
from contenders.serving.stations import Chunk, Conversation, Station
from contenders.serving.wires import Wire
from fusionai.errors import ConfigError
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.serving.serving_estimator import range_times
from fusionai.scheduling.serving.serving_plan import ServingPlan
from fusionai.scheduling.serving.serving_task import ServingTask

_GATEWAY = -1


def simulate_serving(
    task: ServingTask,
    plan: ServingPlan,
    requests: Sequence[Request],
    *,
    until_s: float = math.inf,
    warm_up_s: float = 0.0,
    in_turn: bool = False,
) -> ServingReport:
    """Serve requests by a plan.

    Args:
        task: what was planned.
        plan: for this task's model and machines.
        requests: any order.
        until_s: simulated seconds after which the run ends; else when all requests are answered.
        warm_up_s: not measured.
        in_turn: links carry prompts and tokens one after another, instead of tokens first.

    Raises:
        ConfigError: the plan is for another model, a request can never be admitted, or nothing would be measured.
    """
    if plan.graph_hash != task.model.graph_hash:
        raise ConfigError(f"the plan is for {plan.model}, the task for {task.model.name}; plan the task again")
    run = _Run(task, plan, sorted(requests, key=lambda each: each.arrival_s), warm_up_s, in_turn)
    return run.report(until_s)


class _Run:
    def __init__(
        self, task: ServingTask, plan: ServingPlan, requests: list[Request], warm_up_s: float, in_turn: bool
    ) -> None:
        self.task, self.plan, self.requests = task, plan, requests
        self.warm_up_s, self.in_turn = warm_up_s, in_turn
        place = {member.peer: index for index, member in enumerate(task.members)}
        self.machine_of = [place[shard.peer] for shard in plan.shards]
        devices = [task.members[machine].device for machine in self.machine_of]
        self.stations = [Station(task, device, shard.batch) for shard, device in zip(plan.shards, devices, strict=True)]
        self.owner: Station | None = None
        if plan.private:
            assert task.owner is not None
            self.owner = Station(task, task.owner.device, max(1, len(requests)))
        kv_sums = [[0.0, *np.cumsum(task.model.kv_bytes_S).tolist()]] * len(devices)
        self.cache_bytes = []
        for shard, device in zip(plan.shards, devices, strict=True):
            fixed = range_times(task.model, device, task.load, task.precision).fixed_bytes[shard.first, shard.last]
            self.cache_bytes.append(device.memory_bytes / MEMORY_MARGIN - float(fixed))
        self.router = Router(plan, kv_sums, self.cache_bytes)
        self.least_room = list(self.cache_bytes)
        self.waiting: deque[Request] = deque()
        self.events: list[tuple[float, bool, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.now_s = 0.0
        self.wires: dict[tuple[int, int], Wire] = {}
        self.finished = self.generated = self.admitted = 0
        self.first_latencies: list[float] = []
        self.token_latencies: list[float] = []
        self.sequence_seconds = 0.0
        self.counted_s = 0.0

    # --- events ---------------------------------------------------------------------------------------------------

    def at(self, when_s: float, call: Callable[[], None], *, late: bool = False) -> None:
        """Call something at a time, if `late` after everything else of that time."""
        heapq.heappush(self.events, (when_s, late, next(self.order), call))

    def report(self, until_s: float) -> ServingReport:
        for request in self.requests:
            if request.arrival_s <= until_s:
                self.at(request.arrival_s, lambda request=request: self._arrive(request))  # type: ignore[misc]
        while self.events and self.events[0][0] <= until_s:
            when_s, _, _, call = heapq.heappop(self.events)
            self._count_to(when_s)
            self.now_s = when_s
            call()
        if self.waiting and not self.events:
            request = self.waiting[0]
            raise ConfigError(
                f"a request of {request.prompt_tokens} + {request.output_tokens} tokens fits no route of the plan, "
                "even when all caches are empty; shorten the longest requests, or give the machines more memory"
            )
        end_s = until_s if math.isfinite(until_s) else self.now_s
        self._count_to(end_s)
        measured_s = end_s - self.warm_up_s
        if not measured_s > 0:
            raise ConfigError(
                f"warm_up_s must be less than the run's {end_s:.3g} s, got {self.warm_up_s}; give more requests"
            )
        return ServingReport(
            requests=len(self.requests),
            finished=self.finished,
            measured_from_s=self.warm_up_s,
            measured_to_s=end_s,
            tokens_per_s=self.generated / measured_s,
            prompt_latency=spread_of(self.first_latencies),
            token_latency=spread_of(self.token_latencies),
            machines=tuple(
                MachineUse(
                    shard.peer,
                    min(station.busy_s / measured_s, 1.0),
                    station.batched / station.passes if station.passes else 0.0,
                    1 - least / cache if cache > 0 else 0.0,
                )
                for shard, station, least, cache in zip(
                    self.plan.shards, self.stations, self.least_room, self.cache_bytes, strict=True
                )
            ),
            mean_sequences=self.sequence_seconds / measured_s,
        )

    def _count_to(self, when_s: float) -> None:
        start_s = max(self.counted_s, self.warm_up_s)
        if when_s > start_s:
            self.sequence_seconds += (self.admitted - self.finished) * (when_s - start_s)
        self.counted_s = max(self.counted_s, when_s)

    # --- requests -------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        self.waiting.append(request)
        self._admit()

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            route = self.router.route(request.prompt_tokens + request.output_tokens)
            if route is None:
                return
            self.waiting.popleft()
            self.admitted += 1
            for hop in route:
                self.least_room[hop.machine] = min(self.least_room[hop.machine], self.router.room_bytes[hop.machine])
            sequence = Conversation(request, route)
            for start in range(0, request.prompt_tokens, self.plan.prompt_chunk):
                tokens = min(self.plan.prompt_chunk, request.prompt_tokens - start)
                chunk = Chunk(sequence, tokens, start + tokens)
                if self.owner is None:
                    self._forward_chunk(chunk, 0, _GATEWAY, self.task.front)
                else:
                    self.owner.prompts.append((chunk, -1))
            if self.owner is not None:
                self._work(self.owner, _GATEWAY)

    def _next_round(self, sequences: list[Conversation]) -> None:
        """Begin a round of sequences at the gateway: they are embedded there, or sent to their first machines."""
        if self.owner is None:
            self._forward(sequences, 0, _GATEWAY, self.task.front)
        else:
            self.owner.tokens.extend((each, -1) for each in sequences)
            self._work(self.owner, _GATEWAY)

    def _forward(self, sequences: list[Conversation], step: int, source: int, position: int) -> None:
        """Send tokens that have been worked on up to a position to their `step`-th machines."""
        by_target: dict[int, list[Conversation]] = {}
        for each in sequences:
            target = each.route[step].machine if step < len(each.route) else _GATEWAY
            by_target.setdefault(target, []).append(each)
        size = float(self.task.model.crossing_bytes_P[position])
        for target, group in by_target.items():
            self._wire(source, target).send(len(group) * size, (group, step))

    def _forward_chunk(self, chunk: Chunk, step: int, source: int, position: int) -> None:
        """The same with a part of a prompt; at the end only its last token goes on, to be sampled."""
        size = float(self.task.model.crossing_bytes_P[position])
        route = chunk.sequence.route
        if step < len(route):
            self._wire(source, route[step].machine).send_bulk(chunk.tokens * size, (chunk, step))
        elif chunk.complete:
            self._wire(source, _GATEWAY).send(size, ([chunk.sequence], step))

    def _wire(self, source: int, target: int) -> Wire:
        if (found := self.wires.get((source, target))) is None:
            one, other = (self.task.gateway if end < 0 else self.machine_of[end] for end in (source, target))
            found = self.wires[source, target] = Wire(
                float(self.task.bandwidth_NN[one, other]),
                float(self.task.delay_NN[one, other]),
                lambda message: self._delivered(target, *message),
                self.at,
                lambda: self.now_s,
                in_turn=self.in_turn,
            )
        return found

    def _delivered(self, target: int, what: list[Conversation] | Chunk, step: int) -> None:
        if target == _GATEWAY and self.owner is None:
            assert isinstance(what, list)
            self._sampled(what)
            return
        station = self.stations[target] if target != _GATEWAY else self.owner
        assert station is not None
        if isinstance(what, Chunk):
            station.prompts.append((what, step))
        else:
            station.tokens.extend((each, step) for each in what)
        self._work(station, target)

    # --- passes ---------------------------------------------------------------------------------------------------

    def _work(self, station: Station, machine: int) -> None:
        """Begin a pass if the machine is free, with all that arrives at this very time."""
        if not (station.busy or station.due) and (station.prompts or station.tokens):
            station.due = True
            self.at(self.now_s, lambda: self._begin(station, machine), late=True)

    def _begin(self, station: Station, machine: int) -> None:
        station.due, station.busy = False, True
        if station.prompts and not (station.tokens and station.prompt_last):
            station.prompt_last = True
            chunk, step = station.prompts.popleft()
            hop_first, hop_last = self._span(chunk.sequence, step)
            seconds = station.prompt_s(chunk.tokens, chunk.end, hop_first, hop_last)
            self.at(self.now_s + seconds, lambda: self._chunk_passed(station, machine, chunk, step, hop_last))
        else:
            station.prompt_last = False
            group = [station.tokens.popleft() for _ in range(min(station.batch, len(station.tokens)))]
            seconds = station.decode_s(
                [
                    (sequence.request.prompt_tokens + sequence.made, *self._span(sequence, step))
                    for sequence, step in group
                ]
            )
            if self.now_s >= self.warm_up_s:
                station.passes += 1
                station.batched += len(group)
            self.at(self.now_s + seconds, lambda: self._passed(station, machine, group))
        station.busy_s += max(0.0, self.now_s + seconds - max(self.now_s, self.warm_up_s))

    def _span(self, sequence: Conversation, step: int) -> tuple[int, int]:
        if step < 0:
            return 0, self.task.front
        if step == len(sequence.route):
            return self.task.back, self.task.back + 1
        hop = sequence.route[step]
        return hop.first, hop.last

    def _chunk_passed(self, station: Station, machine: int, chunk: Chunk, step: int, position: int) -> None:
        station.busy = False
        self._forward_chunk(chunk, step + 1, machine, position)
        self._work(station, machine)

    def _passed(self, station: Station, machine: int, group: list[tuple[Conversation, int]]) -> None:
        station.busy = False
        sampled: list[Conversation] = []
        onward: dict[tuple[int, int], list[Conversation]] = {}
        for sequence, step in group:
            if machine == _GATEWAY and step == len(sequence.route):
                sampled.append(sequence)
            else:
                onward.setdefault((step + 1, self._span(sequence, step)[1]), []).append(sequence)
        for (step, position), sequences in onward.items():
            self._forward(sequences, step, machine, position)
        if sampled:
            self._sampled(sampled)
        self._work(station, machine)

    def _sampled(self, group: list[Conversation]) -> None:
        """Take a token of each sequence, end those that are complete, and begin the next round of the others."""
        going, measured, ended = [], self.now_s >= self.warm_up_s, False
        for sequence in group:
            sequence.made += 1
            if sequence.made == 1:
                sequence.first_s = self.now_s
                if measured:
                    self.first_latencies.append(self.now_s - sequence.request.arrival_s)
            elif measured:
                self.token_latencies.append(self.now_s - sequence.last_s)
            sequence.last_s = self.now_s
            self.generated += measured
            if sequence.made < sequence.request.output_tokens:
                going.append(sequence)
                continue
            self.router.release(sequence.route, sequence.tokens)
            self.finished += 1
            ended = True
        if going:
            self._next_round(going)
        if ended:
            self._admit()
