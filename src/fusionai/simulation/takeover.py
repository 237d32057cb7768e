"""A backup takes over a dead machine's stages: first it gets their state, then what neighbours send again.

Both take their place on links, uplinks and downlinks beside everything else of the step, and a second death may end
either. Times are seconds since the step's start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fusionai.simulation.backups import StateSource, compute_s, replay_s
from fusionai.simulation.pass_executor import PassExecutor
from fusionai.simulation.placed_stages import PlacedStage, PlacedStages, TensorLane
from fusionai.simulation.simulated_links import SimulatedLink
from fusionai.simulation.simulation_report import FailureReport


@dataclass(slots=True)
class Takeover:
    """A failure whose recovery may not be over."""

    report: FailureReport
    stages: list[PlacedStage]
    backup: str
    sources: Sequence[StateSource]
    due_s: float
    """When what is next could begin, if its links were free; infinity when nothing is."""
    next_s: float = 0.0
    """When what is next begins, or looks again whether its links are free; not before `due_s`."""
    restored: bool = False
    """The state is there, as of `due_s`."""
    replay_from_s: float = math.inf
    replay_until_s: float = math.inf
    """Between these the backup computes finished steps again."""
    replay_compute_s: float = 0.0
    """What it computes meanwhile."""

    def __post_init__(self) -> None:
        self.next_s = self.due_s

    def go_on(self, executor: PassExecutor, placed: PlacedStages, step_start_s: float) -> None:
        """Begin what is next, now that it is `next_s`, or wait until its links are free."""
        now_s = self.next_s
        used = self._replay_channels() if self.restored else self._state_channels(placed)
        if (free_s := max((channel.ready_s for channel in used), default=now_s)) > now_s:
            self.next_s = free_s
        elif self.restored:
            self._replay(executor, placed, now_s, step_start_s)
        else:
            arrivals_s = [
                placed.channels.send_state(peer, self.backup, size_bytes, now_s)
                for source in self.sources
                for peer, size_bytes in source.parts
            ]
            self.restored = True
            self.due_s = self.next_s = max(arrivals_s, default=now_s)

    def look_again(self, now_s: float) -> None:
        """Do not wait any longer for a link that a death may have freed."""
        if self.next_s > self.due_s:
            self.next_s = max(now_s, self.due_s)

    def cut_short(self, machine: str, at_s: float) -> None:
        """Take a death that may have come while the backup was still getting its state, or replaying."""
        if machine != self.backup:
            return
        self.due_s = self.next_s = math.inf
        if at_s < self.replay_until_s:
            length_s = self.replay_until_s - self.replay_from_s
            self.replay_compute_s *= max(0.0, at_s - self.replay_from_s) / length_s if self.replay_compute_s else 0.0
            self.replay_from_s = self.replay_until_s = min(self.replay_from_s, at_s)

    def _state_channels(self, placed: PlacedStages) -> list[SimulatedLink]:
        return [
            placed.channels.between(peer, self.backup)
            for source in self.sources
            for peer, _ in source.parts
            if peer != self.backup
        ]

    def _lanes(self) -> list[tuple[TensorLane, SimulatedLink, int]]:
        """Return what neighbours send again: lanes with their links, and how many microbatches a step has."""
        if not self.report.replayed_steps:
            return []
        return [
            (lane, lane.channel, stage.microbatches)
            for stage in self.stages
            for lane in (*stage.into[0], *stage.into[1])
            if lane.channel is not None
        ]

    def _replay_channels(self) -> list[SimulatedLink]:
        return [channel for _, channel, _ in self._lanes()]

    def _replay(self, executor: PassExecutor, placed: PlacedStages, now_s: float, step_start_s: float) -> None:
        steps = self.report.replayed_steps
        self.report = msgspec.structs.replace(self.report, restored_s=step_start_s + self.due_s)
        sent_s = [
            channel.send(now_s, steps * microbatches * lane.seconds, steps * microbatches * lane.sent_bytes)
            for lane, channel, microbatches in self._lanes()
        ]
        self.replay_from_s = now_s
        self.replay_until_s = max([now_s + steps * replay_s(placed, self.stages), *sent_s])
        self.replay_compute_s = steps * compute_s(self.stages)
        self.due_s = self.next_s = math.inf
        for stage in self.stages:
            executor.restore(stage, self.replay_until_s)
