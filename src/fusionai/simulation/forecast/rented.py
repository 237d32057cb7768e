"""What the same job would take on a rented card, and cost."""

from __future__ import annotations

import msgspec

from fusionai.errors import PlacementError
from fusionai.scheduling.profile import DeviceProfile, Member
from fusionai.simulation.forecast.alone import lacking
from fusionai.simulation.forecast.offload import offloaded
from fusionai.simulation.forecast.request import Request, plan_at_home
from fusionai.simulation.hardware.catalogue import everything
from fusionai.simulation.hardware.efficiency import profile_of

SEEN_BY_CLOUD = "A cloud would see the data, which this job keeps on the owner's machine"
"""What is said where a private job is offered a rented card."""


class Rented(msgspec.Struct, frozen=True, kw_only=True):
    """One card of a cloud, on demand, with nothing else."""

    hardware: str
    usd_per_hour: float
    priced: str
    """When the price was valid, about: an ISO date."""
    predicted_step_s: float
    tokens_per_s: float
    speedup: float
    """Over the plan for the pool; above 1, the card is faster."""
    usd_per_million_tokens: float
    main_memory_bytes: int
    """0 where the card holds everything; else what the state takes in main memory."""


def each_rented(request: Request, pool_step_s: float) -> tuple[Rented, ...]:
    """Return what every card of the catalogue with a rent would do with the job, the cheapest by token first."""
    found = []
    for hardware in everything():
        price = hardware.rent_per_hour
        if price is None:
            continue
        step = _step(request, profile_of(hardware))
        if step is None:
            continue
        step_s, main_memory_bytes = step
        tokens_per_s = request.tokens_per_step / step_s
        found.append(
            Rented(
                hardware=hardware.name,
                usd_per_hour=price.usd,
                priced=price.date.isoformat(),
                predicted_step_s=step_s,
                tokens_per_s=tokens_per_s,
                speedup=pool_step_s / step_s,
                usd_per_million_tokens=price.usd / 3600 * 1e6 / tokens_per_s,
                main_memory_bytes=main_memory_bytes,
            )
        )
    return tuple(sorted(found, key=lambda each: each.usd_per_million_tokens))


def _step(request: Request, device: DeviceProfile) -> tuple[float, int] | None:
    """Return a step's seconds, and the bytes of its state if that is in main memory; None where nothing fits."""
    if not lacking(request, request.whole_cost, device):
        try:
            return plan_at_home(request, Member("rented", device.name, device, (), True)).predicted_step_s, 0
        except PlacementError:
            pass  # It holds the weights but not the microbatches that its schedule needs.
    best = offloaded(request, device)
    return None if best is None else (best.step_s, best.main_memory_bytes)
