"""How many of a step's microbatches each pipeline takes."""

from __future__ import annotations

import numpy as np

from fusionai.scheduling.links import Floats, Indices


def shared_out(latency_s: Floats, period_s: Floats, microbatches: int) -> Indices:
    """Return the shares with which the last pipeline is done soonest; a pipeline may get none.

    Pipeline r needs latency_s[r] + (m - 1) * period_s[r] for m microbatches. Bisection for the least time in which all
    together do enough, then the surplus is taken where it ends last: exact for this model.
    """

    def done(within_s: float) -> Indices:
        counts = np.floor((within_s - latency_s) / np.maximum(period_s, 1e-15) * (1 + 1e-12)) + 1
        return np.clip(np.where(latency_s <= within_s, counts, 0), 0, microbatches).astype(np.int64)

    low, high = 0.0, float(np.min(latency_s + (microbatches - 1) * period_s))
    for _ in range(64):
        middle = (low + high) / 2
        if (enough := int(done(middle).sum())) >= microbatches:
            high = middle
            if enough == microbatches:  # Shares only grow with time: all times of the same sum have the same shares.
                break
        else:
            low = middle
    shares = done(high)
    for _ in range(int(shares.sum()) - microbatches):
        ends = np.where(shares > 0, latency_s + (shares - 1) * period_s, -np.inf)
        shares[int(np.argmax(ends))] -= 1
    return shares


def slowest_s(latency_s: Floats, period_s: Floats, shares: Indices) -> float:
    """Return when the last pipeline is done."""
    used = shares > 0
    return float((latency_s + (shares - 1) * period_s)[used].max())
