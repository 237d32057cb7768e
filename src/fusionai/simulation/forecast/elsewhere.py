"""Where a job could be trained that a pool cannot hold."""

from __future__ import annotations

import math

from fusionai.scheduling.explain import bytes_text
from fusionai.simulation.forecast.offload import offloaded
from fusionai.simulation.forecast.rented import each_rented
from fusionai.simulation.forecast.request import Request
from fusionai.simulation.hardware.what_if_pool import WhatIfPool
from fusionai.simulation.report_tables import usd_text


def elsewhere(request: Request, what_if: WhatIfPool) -> str:
    """Return what the owner's own GPU with main memory, and the cheapest rented card, would do; "" if neither could."""
    ways = []
    owner = what_if.owner
    own = None if owner is None else offloaded(request, owner.device)
    if owner is not None and own is not None:
        tokens_per_s = request.tokens_per_step / own.step_s
        ways.append(
            f"{owner.name} by itself with {bytes_text(own.main_memory_bytes)} of main memory for what its GPU cannot "
            f"hold (about {tokens_per_s:,.0f} tokens/s, by a system that offloads: this one does not)"
        )
    if cards := each_rented(request, math.inf):
        cheapest = cards[0]
        beside = f" with {bytes_text(cheapest.main_memory_bytes)} of main memory" if cheapest.main_memory_bytes else ""
        ways.append(
            f"one rented {cheapest.hardware}{beside} ({cheapest.tokens_per_s:,.0f} tokens/s, "
            f"{usd_text(cheapest.usd_per_million_tokens)} per million tokens)"
        )
    return f"What could train it: {', or '.join(ways)}" if ways else ""
