"""Where a job could be trained that a pool cannot hold."""

from __future__ import annotations

import math

from fusionai.errors import PlacementError
from fusionai.simulation.forecast.alone import at_home
from fusionai.simulation.forecast.rented import SEEN_BY_CLOUD, Rented, each_rented
from fusionai.simulation.forecast.request import Request
from fusionai.simulation.hardware.what_if_pool import WhatIfPool
from fusionai.units.byte_counts import bytes_text
from fusionai.units.money import usd_text
from fusionai.units.token_rates import rate_text


def saying_elsewhere(error: PlacementError, request: Request, what_if: WhatIfPool) -> PlacementError:
    """Return why a pool cannot hold a job, and what else could train it. Blocks for seconds with large models."""
    others = elsewhere(request, what_if)
    return PlacementError(f"{error}. {others}" if others else str(error))


def elsewhere(request: Request, what_if: WhatIfPool) -> str:
    """Return what the owner's own device, and the cheapest rented card, would do alone; "" if neither could."""
    ways = [_owner(request, what_if)]
    if cards := each_rented(request, math.inf):
        ways.append(_rented(cards[0], request.problem.privacy == "private"))
    found = ", or ".join(way for way in ways if way)
    return f"What could train it: {found}" if found else ""


def _owner(request: Request, what_if: WhatIfPool) -> str:
    """Return what the owner's machine would do: as it is, else with main memory; "" where it could not."""
    if what_if.owner is None:
        return ""
    own = at_home(request, what_if.owner, math.inf)
    if own.tokens_per_s is not None:
        device, rate = what_if.owner.device.name, rate_text(own.tokens_per_s)
        return f"{own.machine} by itself, whose {device} holds the whole job (about {rate})"
    if own.offload is None:
        return ""
    rate = rate_text(request.tokens_per_step / own.offload.step_s)
    return (
        f"{own.machine} by itself with {bytes_text(own.offload.main_memory_bytes)} of main memory for what its GPU "
        f"cannot hold (about {rate}, by a system that offloads: this one does not)"
    )


def _rented(card: Rented, private: bool) -> str:
    beside = f" with {bytes_text(card.main_memory_bytes)} of main memory" if card.main_memory_bytes else ""
    rate, price = rate_text(card.tokens_per_s), usd_text(card.usd_per_million_tokens)
    warning = f". {SEEN_BY_CLOUD}" if private else ""
    return f"one rented {card.hardware}{beside} (about {rate}, {price} per million tokens){warning}"
