"""Lab mode's emulated speed of a machine: its passes take longer by a factor, which may change at a step."""

from __future__ import annotations

import msgspec

from fusionai.errors import ConfigError


class Throttle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine that becomes slower while it trains, as a machine does that grows too hot."""

    after_steps: int
    """Steps of the job, counted from its first, that run at full speed."""
    factor: float
    """From then on passes take this many times as long, in addition to a slowdown."""

    def __post_init__(self) -> None:
        if self.after_steps < 0:
            raise ConfigError(f"after_steps must be at least 0, got {self.after_steps}")
        if not 1 <= self.factor < 1e6:
            raise ConfigError(f"factor must be at least 1, got {self.factor}")


class Slowdown(msgspec.Struct, frozen=True):
    """The factors that make a machine slower than its hardware."""

    factor: float = 1.0
    throttle: Throttle | None = None

    def at(self, step: int) -> float:
        """Return the factor in a step. The job's first step is 0."""
        throttled = self.throttle is not None and step >= self.throttle.after_steps
        return self.factor * (self.throttle.factor if throttled and self.throttle is not None else 1.0)

    @property
    def emulated(self) -> bool:
        """Whether it changes anything."""
        return self.factor != 1.0 or self.throttle is not None


FULL_SPEED = Slowdown()
