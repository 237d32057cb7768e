"""The passes of one step, executed: every pass starts when its machine is free and its tensors are there.

The order is the training runtime's and `fusionai.scheduling.pipeline`'s: each stage takes forwards and backwards in
order, no more in flight than it may hold, the forward first if both could run; a machine with several stages that could
run a pass takes a backward before a forward and a later stage before an earlier one. Without faults, sharing and
background uploads, one pipeline's times are those of `pipeline_times`, to the last bit.

Times are seconds since the step's start.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fusionai.simulation.placed_stages import PlacedStage, PlacedStages, TensorLane

_SENDING = -1
"""Rank of a send among events of the same time: before passes (0: backward, 1: forward)."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass that ran, whole or up to its machine's death."""

    pipeline: int
    stage: int
    machine: str
    backward: bool
    microbatch: int
    start_s: float
    end_s: float
    again: bool
    """Computed before by a machine that died."""
    lost: bool
    """Its machine died before it ended."""


class PassExecutor:
    """One step's passes over all pipelines."""

    def __init__(
        self,
        placed: PlacedStages,
        *,
        factors: Mapping[str, float] | None = None,
        dies_s: Mapping[str, float] | None = None,
        record: bool = False,
    ) -> None:
        """Begin a step.

        Args:
            placed: the stages; their state is that of this step from now on.
            factors: on the seconds of passes, by machine; 1 for those not named.
            dies_s: when machines die; those not named do not.
            record: keep the passes in `passes`.
        """
        self._placed = placed
        self._shared = placed.channels.shared
        self.factors = factors or {}
        self.dies_s = dict(dies_s or {})
        self.passes: list[Pass] | None = [] if record else None
        self.busy_s: dict[str, float] = {}
        self.free_s: dict[str, float] = {}
        self.end_s = 0.0
        self.lost_s = 0.0
        """Seconds of passes that their machine's death cut off."""
        self.again_s = 0.0
        """Seconds of passes that had been computed before."""
        self.left = 0
        """Passes still to do."""
        self._sends = 0
        # A pass: (start, forward, minus stage, number, epoch); the start is a lower bound. A send: (time, _SENDING,
        # count, lane, microbatch, epoch of the receiver).
        self._queue: list[tuple[float, int, int, int, int] | tuple[float, int, int, int, int, int]] = []
        for stage in placed.stages:
            stage.begin(self.factors.get(stage.machine, 1.0))
            self.busy_s[stage.machine] = self.free_s[stage.machine] = 0.0
            self.left += 2 * stage.microbatches
        for stage in placed.stages:
            self._offer(stage)

    def run(self, until_s: float = math.inf) -> bool:
        """Work through what starts before `until_s`; return whether all passes are done."""
        queue, stages, free_s = self._queue, self._placed.stages, self.free_s
        while queue and queue[0][0] < until_s:
            event = heapq.heappop(queue)
            if event[1] == _SENDING:
                self._send_due(event)
                continue
            start_s, rank, minus_stage, number, epoch = event  # type: ignore[misc]
            stage = stages[number]
            if epoch != stage.epoch:
                continue
            if start_s < free_s[stage.machine]:
                heapq.heappush(queue, (free_s[stage.machine], rank, minus_stage, number, epoch))
                continue
            if rank == 0 and self._forward_is_ready(stage, start_s):
                stage.queued[1] = False  # Offered again once the forward has run.
                continue
            self._pass(stage, start_s, backward=not rank)
        return self.left == 0

    def _offer(self, stage: PlacedStage) -> None:
        """Queue a stage's next passes if everything they need is on its way."""
        forwards, backwards = stage.done
        if backwards < forwards and not stage.queued[1]:
            self._queue_pass(stage, 1, backwards)
        if forwards < stage.microbatches and forwards - backwards < stage.load.in_flight and not stage.queued[0]:
            self._queue_pass(stage, 0, forwards)

    def _queue_pass(self, stage: PlacedStage, backward: int, index: int) -> None:
        ready_s = self._ready_s(stage, backward, index)
        if ready_s < math.inf:
            stage.queued[backward] = True
            heapq.heappush(self._queue, (ready_s, 1 - backward, -stage.stage, stage.number, stage.epoch))

    @staticmethod
    def _ready_s(stage: PlacedStage, backward: int, index: int) -> float:
        """Return when everything that a pass needs is there; infinite while something has not been sent."""
        ready_s = stage.available_s
        for lane in stage.into[backward]:
            if lane.arrival_s[index] > ready_s:
                ready_s = lane.arrival_s[index]
        return ready_s

    def _forward_is_ready(self, stage: PlacedStage, now_s: float) -> bool:
        """Return whether a stage's forward, queued and so with room, has its tensors."""
        return stage.queued[0] and self._ready_s(stage, 0, stage.done[0]) <= now_s

    def _pass(self, stage: PlacedStage, start_s: float, *, backward: bool) -> None:
        machine, index = stage.machine, stage.done[backward]
        seconds = (stage.backward_s if backward else stage.forward_s) * stage.factor
        end_s = start_s + seconds
        again, dies_s = index < stage.redo_until[backward], self.dies_s.get(machine, math.inf)
        lost = end_s > dies_s
        if self.passes is not None:
            until_s = min(end_s, dies_s)
            self.passes.append(
                Pass(stage.pipeline, stage.stage, machine, backward, index, start_s, until_s, again, lost)
            )
        sent_s = end_s - stage.deferred_s * stage.factor if backward else end_s
        if lost:
            self.busy_s[machine] += dies_s - start_s
            self.lost_s += dies_s - start_s
            self.free_s[machine] = math.inf
            if sent_s > dies_s:
                return
        else:
            self.free_s[machine] = end_s
            self.busy_s[machine] += seconds
            if again:
                self.again_s += seconds
            stage.done[backward] += 1
            stage.queued[backward] = False
            self.left -= 1
            if end_s > self.end_s:
                self.end_s = end_s
            if again and stage.caught_up:
                stage.caught_up_s = end_s
        for lane in stage.out[backward]:
            lane.made_s[index] = sent_s
            if lane.arrival_s[index] == math.inf:
                self._hand_over(lane, index, sent_s)
        if not lost:
            self._offer(stage)

    def _hand_over(self, lane: TensorLane, index: int, now_s: float) -> None:
        """Give a tensor to its link, or to the receiver on the same machine, once the receiver can take it."""
        target = lane.target
        if target.available_s > now_s:
            now_s = target.available_s
        if lane.channel is None:
            self._arrive(lane, index, now_s)
        elif self._shared and now_s < math.inf:
            # Machines compete for a receiver's downlink in the order of their sends, which is not that of their passes.
            self._sends += 1
            heapq.heappush(self._queue, (now_s, _SENDING, self._sends, lane.number, index, target.epoch))
        else:
            self._send(lane, index, now_s)

    def _send_due(self, event: tuple[float, int, int, int, int] | tuple[float, int, int, int, int, int]) -> None:
        now_s, _, _, number, index, epoch = event  # type: ignore[misc]
        lane = self._placed.lanes[number]
        if epoch != lane.target.epoch or lane.made_s[index] > now_s or lane.arrival_s[index] < math.inf:
            return
        if lane.channel is not None and (ready_s := lane.channel.ready_s) > now_s:
            # It takes its place on the uplink only when its link is free, so that a slow link holds up no other.
            heapq.heappush(self._queue, (ready_s, *event[1:]))
            return
        self._send(lane, index, now_s)

    def _send(self, lane: TensorLane, index: int, now_s: float) -> None:
        channel = lane.channel
        if channel is None or now_s == math.inf:
            return
        left_s = channel.send(now_s, lane.seconds, lane.sent_bytes)
        if left_s <= self.dies_s.get(lane.source.machine, math.inf):
            self._arrive(lane, index, left_s + channel.delay_s)

    def _arrive(self, lane: TensorLane, index: int, arrival_s: float) -> None:
        lane.arrival_s[index] = arrival_s
        target = lane.target
        if index == target.done[lane.backward]:
            self._offer(target)

    def lose(self, machine: str) -> list[PlacedStage]:
        """Take a machine's death at the time up to which the step has run; return the stages it held.

        They begin the step again wherever `restore` puts them. What they received is gone, but senders keep it; what
        they sent and is through stays.
        """
        lost = self._placed.held_by(machine)
        for stage in lost:
            stage.epoch += 1
            self.left += sum(stage.done)
            stage.redo_until = [max(pair) for pair in zip(stage.redo_until, stage.done, strict=True)]
            stage.done, stage.queued = [0, 0], [False, False]
            stage.available_s = stage.caught_up_s = math.inf
            for lane in (*stage.into[0], *stage.into[1]):
                lane.arrival_s = [math.inf] * stage.microbatches
            for lane in (*stage.out[0], *stage.out[1]):
                lane.made_s = [math.inf] * stage.microbatches
        return lost

    def look_again(self, now_s: float) -> None:
        """Let tensors that wait for a link, which a death may have freed, look again whether it is."""
        if not self._shared:
            return
        for place, event in enumerate(self._queue):
            if event[1] == _SENDING:
                _, _, _, number, index, _ = event  # type: ignore[misc]
                lane = self._placed.lanes[number]
                due_s = max(now_s, lane.made_s[index], lane.target.available_s)
                self._queue[place] = min(event[0], due_s), *event[1:]
        heapq.heapify(self._queue)

    def restore(self, stage: PlacedStage, at_s: float) -> None:
        """Let a lost stage, moved by now, compute from `at_s` on; neighbours send again what they kept for it."""
        stage.factor = self.factors.get(stage.machine, 1.0)
        stage.available_s = at_s
        self.busy_s.setdefault(stage.machine, 0.0)
        self.free_s[stage.machine] = max(at_s, self._lives_free_s(stage.machine))
        if stage.caught_up:
            stage.caught_up_s = at_s
        # In the order in which the stage needs them.
        for backward, index in stage.in_order():
            for lane in stage.into[backward]:
                if lane.made_s[index] < math.inf and lane.arrival_s[index] == math.inf:
                    self._hand_over(lane, index, lane.made_s[index])
        self._offer(stage)

    def _lives_free_s(self, machine: str) -> float:
        """Return when a machine is free; one that came back after its death is free at once."""
        free_s = self.free_s.get(machine, 0.0)
        return 0.0 if free_s == math.inf else free_s
