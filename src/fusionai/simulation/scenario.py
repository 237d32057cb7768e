"""The conditions of a simulation: how many steps, which codecs, which faults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fusionai.errors import ConfigError
from fusionai.simulation.availability import Churn, Scripted
from fusionai.simulation.codecs import Codec, Dense
from fusionai.simulation.jitter import Jitter
from fusionai.simulation.prices import Prices
from fusionai.simulation.simulated_recovery import Recovery, Replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything about a simulation that is not the plan, its machines or its links. Raises ConfigError."""

    steps: int = 1
    codec: Codec = field(default_factory=Dense)
    link_codecs: Mapping[tuple[str, str], Codec] = field(default_factory=dict)
    """By source and target: links that pack otherwise than `codec`."""
    churn: Churn = field(default_factory=Scripted)
    recovery: Recovery = field(default_factory=Replay)
    jitter: Jitter | None = None
    prices: Prices = field(default_factory=Prices)
    tokens_per_microbatch: int | None = None
    timeline_steps: int = 0
    """Steps whose passes are in the report, from the first on."""
    repeat_equal_steps: bool = True
    """Take a step that nothing disturbs for a repetition of the last such one, instead of working through it again."""
    longest_s: float = 10 * 365 * 86400.0
    """Simulated time after which a job that churn keeps from finishing is given up."""
    most_failures: int = 10_000
    """Failures after which it is given up."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.timeline_steps < 0:
            raise ConfigError(f"timeline_steps must be at least 0, got {self.timeline_steps}")
        if not self.longest_s > 0 or math.isnan(self.longest_s):
            raise ConfigError(f"longest_s must be above 0, got {self.longest_s}")

    def codec_of(self, source: str, target: str) -> Codec:
        """Return the codec of the link from one peer to another."""
        return self.link_codecs.get((source, target), self.codec)
