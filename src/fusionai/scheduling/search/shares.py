"""How many of a step's microbatches each pipeline takes."""

from __future__ import annotations

import heapq

import numpy as np

from fusionai.scheduling.links import Floats, Indices


def shared_out(latency_s: Floats, period_s: Floats, microbatches: int) -> Indices:
    """Return the shares with which the last pipeline is done soonest; a pipeline may get none.

    Pipeline r needs latency_s[r] + (m - 1) * period_s[r] for m microbatches. Each microbatch goes where it would end
    soonest, which is exact for this model; of equal ends, to the last of these pipelines. All but the last few of them
    are given out at once: by what the pipelines do until a time at which they cannot have done more together.
    """
    period_s = np.maximum(period_s, 1e-15)
    within_s = _least_s(latency_s, period_s, microbatches)
    counts = np.floor((within_s - latency_s) / period_s * (1 - 1e-12)) + 1
    shares = np.clip(np.where(latency_s <= within_s, counts, 0), 0, microbatches).astype(np.int64)
    left = microbatches - int(shares.sum())
    ends = [
        (end_s, -place) for place, end_s in enumerate((latency_s + shares * period_s).tolist()) if np.isfinite(end_s)
    ]
    heapq.heapify(ends)
    for _ in range(left):
        end_s, minus_place = ends[0]
        shares[-minus_place] += 1
        heapq.heapreplace(ends, (end_s + float(period_s[-minus_place]), minus_place))
    return shares


def _least_s(latency_s: Floats, period_s: Floats, microbatches: int) -> float:
    """Return a time before which the pipelines have not done all, if parts of microbatches counted as done."""
    begins_s = latency_s - period_s
    order = np.argsort(begins_s, kind="stable")
    rate = np.cumsum(1 / period_s[order])
    done = np.cumsum(begins_s[order] / period_s[order])
    # With the first k pipelines at work: sum of (t - begin) / period = microbatches.
    ends_s = (microbatches + done) / rate
    later_s = np.append(begins_s[order][1:], np.inf)
    return float(ends_s[np.argmax(ends_s <= later_s)])


def slowest_s(latency_s: Floats, period_s: Floats, shares: Indices) -> float:
    """Return when the last pipeline is done."""
    used = shares > 0
    return float((latency_s + (shares - 1) * period_s)[used].max())
