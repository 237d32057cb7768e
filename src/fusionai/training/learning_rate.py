"""Learning-rate schedules, as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from fusionai.errors import ConfigError


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the learning rate changes over a run: it rises during the warmup, then follows `kind`."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    """Steps before the full rate is reached. The first of them already uses 1 / (warmup_steps + 1) of the rate."""
    minimum_ratio: float = 0.1
    """Rate at the end of `linear` and `cosine`, as a share of the full rate."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.minimum_ratio <= 1:
            raise ConfigError(f"schedule.minimum_ratio must be in [0, 1], got {self.minimum_ratio}")


def learning_rate(schedule: ScheduleConfig, base: float, step: int, total_steps: int) -> float:
    """Return the rate of the update that ends step `step` (from 0) of a run of `total_steps`.

    `base` is the full rate. As in torch and transformers, the decay reaches its minimum at `total_steps`, one step
    after the last one. After that the rate does not change.
    """
    if step < schedule.warmup_steps:
        return base * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return base
    done = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    left = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return base * (schedule.minimum_ratio + (1.0 - schedule.minimum_ratio) * left)
