"""Snapshots of the stages' states: begun after a step, sent in the background, usable once they arrived whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusionai.simulation.placed_stages import PlacedStage, PlacedStages
from fusionai.simulation.simulated_links import SimulatedLinks


@dataclass(slots=True)
class _Snapshot:
    """States after `step` finished steps; by stage number, the sender and the holders."""

    step: int
    senders: dict[int, str] = field(default_factory=dict)
    holders: dict[int, tuple[str, ...]] = field(default_factory=dict)


class Snapshots:
    """The last snapshot that everybody has, and the one on its way. The initial state is with the driver."""

    def __init__(self, placed: PlacedStages, driver: str) -> None:
        initial: dict[int, tuple[str, ...]] = {stage.number: (driver,) for stage in placed.stages}
        self._channels: SimulatedLinks = placed.channels
        self._whole = _Snapshot(0, dict.fromkeys(initial, driver), initial)
        self._sending: _Snapshot | None = None
        self.begun = self.skipped = 0

    @property
    def whole_step(self) -> int:
        """Return the finished steps of the last snapshot that has arrived for all stages."""
        return self._whole.step

    def begin(self, step: int, stages: list[PlacedStage], holders: dict[int, tuple[str, ...]]) -> None:
        """Begin a snapshot at the start of the step after `step` finished ones, unless the last one is under way."""
        if step in (self._whole.step, self._sending.step if self._sending else None):
            return
        if self._sending:
            self.skipped += 1
            return
        self.begun += 1
        self._sending = _Snapshot(step)
        for stage in stages:
            self._sending.senders[stage.number] = stage.machine
            self._sending.holders[stage.number] = holders[stage.number]
            for holder in holders[stage.number]:
                if holder != stage.machine:
                    self._channels.upload(stage.machine, holder, stage.load.state_bytes)

    def settle(self, now_s: float) -> None:
        """Note what has arrived by a time of this step."""
        sending = self._sending
        if sending and all(
            self._arrived(sending, number, now_s) == sending.holders[number] for number in sending.holders
        ):
            self._whole, self._sending = sending, None

    def lose_sender(self, machine: str, now_s: float) -> None:
        """Take a machine's death: what it had not sent whole by then will not come, so that snapshot is void for it."""
        sending = self._sending
        if sending is None:
            return
        for number, sender in sending.senders.items():
            if sender == machine:
                arrived = self._arrived(sending, number, now_s)
                if not arrived:
                    # The others' parts go on, but without this stage's they are no snapshot of the job: keep the last.
                    self._sending = None
                    return
                sending.holders[number] = arrived

    def of(self, stage: PlacedStage, now_s: float) -> tuple[int, tuple[str, ...]]:
        """Return the finished steps of a stage's newest snapshot that arrived anywhere, and who has it."""
        sending = self._sending
        if sending and stage.number in sending.senders and (arrived := self._arrived(sending, stage.number, now_s)):
            return sending.step, arrived
        return self._whole.step, self._whole.holders[stage.number]

    def _arrived(self, snapshot: _Snapshot, number: int, now_s: float) -> tuple[str, ...]:
        sender = snapshot.senders[number]
        return tuple(
            holder
            for holder in snapshot.holders[number]
            if holder == sender or self._channels.uploaded(sender, holder, now_s)
        )


def neighbours(placed: PlacedStages, count: int, spares: list[str]) -> dict[int, tuple[str, ...]]:
    """Return who holds each stage's snapshot: the next machines of its pipeline, around its end; spares if too few."""
    by_pipeline: dict[int, list[str]] = {}
    for stage in placed.stages:
        machines = by_pipeline.setdefault(stage.pipeline, [])
        if stage.machine not in machines:
            machines.append(stage.machine)
    found = {}
    for stage in placed.stages:
        machines = by_pipeline[stage.pipeline]
        place = machines.index(stage.machine)
        others = machines[place + 1 :] + machines[:place]
        found[stage.number] = tuple([*others, *(spare for spare in spares[:count] if spare not in others)][:count])
    return found
