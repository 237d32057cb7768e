"""The power that machines draw and the rent that they cost while they take part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fusionai.errors import ConfigError
from fusionai.simulation.hardware.catalogue import Hardware


@dataclass(frozen=True, slots=True)
class MachinePrice:
    """One machine: power while it computes, and rent for every hour of the job, busy or not."""

    power_w: float
    rent_usd_per_hour: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Power and money. Energy is power_w x (busy + idle_share x idle) seconds; absent machines draw and cost nothing.

    Raises ConfigError for a share outside [0, 1] or a price below 0.
    """

    machines: Mapping[str, MachinePrice] = field(default_factory=dict)
    """By peer; without an entry a machine draws and costs nothing, and the report names it."""
    idle_share: float = 0.3
    """Share of `power_w` that a waiting machine draws. Assumed: GPUs kept in their working clock draw about a third."""
    usd_per_kwh: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.idle_share <= 1:
            raise ConfigError(f"idle_share must be in [0, 1], got {self.idle_share}")
        if not 0 <= self.usd_per_kwh < math.inf:
            raise ConfigError(f"usd_per_kwh must be at least 0 and finite, got {self.usd_per_kwh}")


def price_of(hardware: Hardware, *, rented: bool) -> MachinePrice | None:
    """Return a catalogue entry's power and, if `rented`, its rent; None where the figures needed are not published."""
    rent = hardware.rent_per_hour
    if hardware.power_w is None or (rented and rent is None):
        return None
    return MachinePrice(hardware.power_w, rent.usd if rented and rent is not None else 0.0)
