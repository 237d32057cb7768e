"""What a job does about the death of a compnode."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusionai.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Detecting:
    """What every way to recover has. Raises ConfigError for negative times or counts below 1."""

    detection_s: float = 1.0
    """From a death to its being known: a reset connection, or missed heartbeats."""
    snapshot_steps: int | None = None
    """A snapshot of the state after every so many steps, sent away in the background; None: only the initial state."""

    def __post_init__(self) -> None:
        if not 0 <= self.detection_s < math.inf:
            raise ConfigError(f"detection_s must be at least 0 and finite, got {self.detection_s}")
        if self.snapshot_steps is not None and self.snapshot_steps < 1:
            raise ConfigError(f"snapshot_steps must be at least 1, got {self.snapshot_steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(_Detecting):
    """FusionAI's way: a backup takes the stage over, and only that stage is computed again.

    The backup gets the state from machines of other pipelines that hold the same weights, else from a peer with the
    stage's last snapshot; neighbours send again what they sent since then. Nobody else rolls back.
    """

    holders: int = 2
    """Peers that each stage's snapshot goes to."""

    def __post_init__(self) -> None:
        # Explicit, because slots give this class another identity than the one that super() closes over.
        _Detecting.__post_init__(self)
        if self.holders < 1:
            raise ConfigError(f"holders must be at least 1, got {self.holders}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart(_Detecting):
    """The baseline: the whole job starts again from its last checkpoint, which the driver holds."""

    restart_s: float = 10.0
    """Starting processes and connecting them, before state is sent."""

    def __post_init__(self) -> None:
        _Detecting.__post_init__(self)
        if not 0 <= self.restart_s < math.inf:
            raise ConfigError(f"restart_s must be at least 0 and finite, got {self.restart_s}")


Recovery = Replay | Restart
