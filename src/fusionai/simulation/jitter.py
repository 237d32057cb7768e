"""Machines' speeds vary: by chance from step to step, and by a slow drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """Factors on the seconds of passes: exp(drift + chance), constant for a machine within a step.

    Chance is normal with standard deviation `spread`, new in every step. Drift is a stationary autoregressive process
    of standard deviation `drift` that keeps the share `memory` of itself from one step to the next, as temperature and
    other users of a machine do. The median factor is 1. These are assumptions, not measurements.

    Raises ConfigError for negative deviations, or a memory outside [0, 1).
    """

    seed: int
    spread: float = 0.0
    drift: float = 0.0
    memory: float = 0.95

    def __post_init__(self) -> None:
        if not (0 <= self.spread < 10 and 0 <= self.drift < 10):
            raise ConfigError(f"jitter's spread and drift must be in [0, 10), got {self.spread} and {self.drift}")
        if not 0 <= self.memory < 1:
            raise ConfigError(f"jitter's memory must be in [0, 1), got {self.memory}")


class SpeedFactors:
    """Draws the factors of one step after another."""

    def __init__(self, jitter: Jitter, peers: Sequence[str]) -> None:
        self._jitter = jitter
        self._peers = tuple(sorted(peers))  # so that the order of a plan does not matter
        self._draw = np.random.Generator(np.random.PCG64(jitter.seed))
        self._drift = jitter.drift * self._draw.standard_normal(len(self._peers))

    def next_step(self) -> dict[str, float]:
        """Return the factors of the next step, by peer."""
        jitter, count = self._jitter, len(self._peers)
        chance = jitter.spread * self._draw.standard_normal(count)
        factors = np.exp(self._drift + chance)
        fresh = jitter.drift * math.sqrt(1 - jitter.memory**2) * self._draw.standard_normal(count)
        self._drift = jitter.memory * self._drift + fresh
        return dict(zip(self._peers, factors.tolist(), strict=True))
