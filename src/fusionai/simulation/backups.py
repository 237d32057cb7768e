"""Which machine takes over a dead machine's stages, where it gets their state, and how long replaying takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusionai.simulation.availability import OutageCalendar
from fusionai.simulation.placed_stages import PlacedStage, PlacedStages
from fusionai.simulation.snapshots import Snapshots
from fusionai.simulation.workload import StageLoad, Workload


@dataclass(frozen=True, slots=True)
class Backup:
    """A machine that can take over lost stages, and the time from which it is there."""

    peer: str
    from_s: float
    loads: tuple[StageLoad, ...]


@dataclass(frozen=True, slots=True)
class StateSource:
    """Where a lost stage's state comes from."""

    step: int
    """Finished steps that the state contains."""
    parts: tuple[tuple[str, float], ...]
    """Peers and bytes."""
    from_s: float
    """When all of these peers are there; infinity if never."""
    words: str


class Backups:
    """The backup pool: machines without a stage. Machines that died and came back belong to it."""

    def __init__(self, workload: Workload, presence: OutageCalendar, offers_bytes: Mapping[str, int]) -> None:
        """`offers_bytes`: memory of every known machine. A machine of the plan that it does not name has enough."""
        self._workload = workload
        self._presence = presence
        self._offers_bytes = offers_bytes
        self._known = tuple(dict.fromkeys((*offers_bytes, *workload.peers)))

    def spares(self, placed: PlacedStages, now_s: float) -> list[str]:
        """Return the machines without a stage that are there now. The driver's machine is no backup."""
        taken = {stage.machine for stage in placed.stages} | {self._workload.driver}
        return [peer for peer in self._known if peer not in taken and self._presence.up_from_s(peer, now_s) == now_s]

    def choose(self, placed: PlacedStages, lost: Sequence[PlacedStage], now_s: float) -> Backup | None:
        """Return the fastest machine that is there now and has room for all of `lost`, else the first to come.

        Returns None when no such machine ever comes.
        """
        gone = lost[0].machine
        taken = {stage.machine for stage in placed.stages if stage.machine != gone} | {self._workload.driver}
        need_bytes = sum(stage.load.memory_bytes for stage in lost)
        best: tuple[float, float, str] | None = None
        for peer in self._known:
            if peer in taken or self._offers_bytes.get(peer, math.inf) < need_bytes:
                continue
            from_s = self._presence.up_from_s(peer, now_s)
            if from_s == math.inf or (best is not None and from_s > best[0]):
                continue
            loads = [self._workload.move(stage.load, peer) for stage in lost]
            choice = from_s, sum(load.forward_s + load.backward_s for load in loads), peer
            if best is None or choice < best:
                best = choice
        if best is None:
            return None
        return Backup(best[2], best[0], tuple(self._workload.move(stage.load, best[2]) for stage in lost))

    def state_of(
        self,
        placed: PlacedStages,
        stage: PlacedStage,
        snapshots: Snapshots,
        step: int,
        *,
        died_s: float,
        known_s: float,
        step_start_s: float,
    ) -> StateSource:
        """Return where the state of a lost stage is.

        Args:
            placed: the stages; the lost ones are still on the dead machine.
            stage: the lost one.
            snapshots: of the job.
            step: finished steps.
            died_s: seconds of the run, when the machine died.
            known_s: seconds of the run, when the death is known.
            step_start_s: seconds of the run, when the present step began.
        """
        if (parts := self._replicas(placed, stage, died_s - step_start_s, known_s)) is not None:
            return StateSource(step, parts, known_s, f"replicas on {', '.join(peer for peer, _ in parts)}")
        snapshot_step, holders = snapshots.of(stage, died_s - step_start_s)
        there = sorted((self._presence.up_from_s(holder, known_s), place) for place, holder in enumerate(holders))
        from_s, place = there[0]
        holder = holders[place]
        what = f"the snapshot after step {snapshot_step}" if snapshot_step else "the initial state"
        parts = ((holder, float(stage.load.state_bytes)),)
        return StateSource(snapshot_step, parts, from_s, f"{what} on {holder or 'the driver'}")

    def _replicas(
        self, placed: PlacedStages, stage: PlacedStage, died_s: float, now_s: float
    ) -> tuple[tuple[str, float], ...] | None:
        """Return machines of other pipelines that hold all of a stage's weights, or None."""
        place = stage.pipeline, stage.stage
        parts: dict[str, float] = {}
        for group in self._workload.groups:
            if place not in group.stages:
                continue
            for other in group.stages:
                held = placed.places.get(other)
                if (
                    held is not None
                    and held.machine != stage.machine
                    # One that is being restored itself has nothing to give yet.
                    and held.available_s <= died_s
                    and self._presence.up_from_s(held.machine, now_s) == now_s
                ):
                    size_bytes = self._workload.state_copies * group.size_bytes
                    parts[held.machine] = parts.get(held.machine, 0.0) + size_bytes
                    break
            else:
                return None
        return tuple(parts.items()) or None


def replay_s(placed: PlacedStages, lost: Sequence[PlacedStage]) -> float:
    """Return the seconds in which the machine that `lost` stages were moved to computes one past step of theirs.

    Neighbours stream the step's boundary tensors while it computes, so each microbatch takes as long as its passes, or
    as its tensors occupy the slowest link that they come over. Stages of one machine compute after each other.
    """
    seconds, by_link = 0.0, dict[tuple[str, str], float]()
    for stage in lost:
        # The factor of the present step stands for those of past ones.
        seconds += stage.microbatches * (stage.forward_s + stage.backward_s) * stage.factor
        for lane in (*stage.into[0], *stage.into[1]):
            if lane.channel is not None:
                link = lane.channel.source, lane.channel.target
                by_link[link] = by_link.get(link, 0.0) + stage.microbatches * lane.seconds
    updates_s = sum(stage.load.update_s * stage.factor for stage in lost)
    return max([seconds, *by_link.values()]) + updates_s


def compute_s(lost: Sequence[PlacedStage]) -> float:
    """Return the compute seconds of one past step of `lost` stages, updates included."""
    return sum(
        (stage.microbatches * (stage.forward_s + stage.backward_s) + stage.load.update_s) * stage.factor
        for stage in lost
    )
