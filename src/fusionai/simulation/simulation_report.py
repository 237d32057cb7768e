"""The result of a simulation as plain frozen data; `msgspec.json.encode` writes it."""

from __future__ import annotations

from typing import Literal

import msgspec


class MachineReport(msgspec.Struct, frozen=True, kw_only=True):
    """One machine over the whole run. busy_s + idle_s + absent_s is the run's time."""

    peer: str
    busy_s: float
    """Passes, updates and recomputing."""
    idle_s: float
    absent_s: float
    utilisation: float
    """Busy share of the time it was there."""
    bubble: float
    """Idle share of the time from a step's start to the last backward of any pipeline, as far as it was there."""
    sent_bytes: float
    received_bytes: float
    energy_j: float
    rent_usd: float


class LinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link over the whole run."""

    source: str
    target: str
    sent_bytes: float
    busy_s: float
    """Seconds that pipelines' tensors, sums and transfers of state took on it; background uploads are left out."""


class FailureReport(msgspec.Struct, frozen=True, kw_only=True):
    """The death of a machine that held stages. Times are seconds since the run's start; null: it never happened."""

    peer: str
    step: int
    """Steps finished before the one it interrupted."""
    died_s: float
    detected_s: float
    backup: str | None
    """Machine that took over; its own peer if it came back first."""
    state_from: str
    """In words."""
    restored_s: float | None
    """When the backup had its state (restart: when all machines had theirs)."""
    replayed_steps: int
    """Finished steps that had to be computed again."""
    caught_up_s: float | None
    """When the backup was as far as the dead machine had been (restart: when the interrupted step began again)."""
    recovery_s: float | None
    """From the death until then."""


class PassReport(msgspec.Struct, frozen=True, kw_only=True):
    """One pass of the timeline, in seconds since the run's start."""

    step: int
    pipeline: int
    stage: int
    peer: str
    direction: Literal["forward", "backward"]
    microbatch: int
    """Its number among the microbatches of its pipeline."""
    start_s: float
    end_s: float
    again: bool
    """Computed before, by a machine that died."""
    lost: bool
    """Its machine died before it ended."""


class SimulationReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    finished: bool
    ended_because: str
    """In words: the steps are done, or what kept them from it."""
    steps: int
    """Steps committed and not rolled back."""
    microbatches: int
    """Microbatches of a step."""
    elapsed_s: float
    microbatches_per_s: float
    tokens_per_s: float | None
    step_s: tuple[float, ...]
    """Every step that was committed, those that a restart undid among them."""
    median_step_s: float
    p95_step_s: float
    passes_share: float
    """Share of the steps' time up to the last backward; the rest is sums, commit and update."""
    utilisation: float
    """Busy share of the time of all machines of the plan together."""
    sent_bytes: float
    lost_s: float
    """Seconds of computing that died with a machine before its result left, or that a restart undid."""
    recomputed_s: float
    """Seconds of computing a second time, by backups."""
    snapshots: int
    snapshots_skipped: int
    """Not begun, because the one before was still being sent."""
    energy_j: float
    rent_usd: float
    electricity_usd: float
    unpriced: tuple[str, ...]
    """Machines whose power and rent nobody gave."""
    machines: tuple[MachineReport, ...]
    links: tuple[LinkReport, ...]
    failures: tuple[FailureReport, ...]
    timeline: tuple[PassReport, ...]
    executed_steps: int
    """Steps worked through; the others repeat one of them."""
