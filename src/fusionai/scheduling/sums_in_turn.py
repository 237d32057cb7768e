"""In which order machines take part in the sums of gradients at the end of a step.

A machine is in one sum at a time, and a sum needs all its machines at once. In a fixed order, sums of neighbouring
weights wait for each other all along the graph, unless all pipelines are cut at the same places. So the sum that can
begin first is next (list scheduling, Graham 1969), of several the one whose busiest machine has most left to sum. The
order follows from the plan: every machine knows it beforehand.

Array suffixes: G = sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusionai.scheduling.links import Floats, Indices


def begin_s(ready_G: Floats, machines: Sequence[Indices], seconds_G: Floats) -> Floats:
    """Return (G,): when each sum begins.

    Args:
        ready_G: seconds before which a sum cannot begin.
        machines: of each sum, by number from 0; at least one, none twice.
        seconds_G: that a sum takes.
    """
    count = len(machines)
    if count == 0:
        return np.zeros(0)
    taking = np.concatenate(machines)
    sizes = np.asarray([len(each) for each in machines])
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    left_N = np.bincount(taking, weights=np.repeat(seconds_G, sizes))
    until_N = np.zeros(len(left_N))
    found = np.full(count, np.inf)
    for _ in range(count):
        earliest_G = np.maximum(ready_G, np.maximum.reduceat(until_N[taking], firsts))
        earliest_G[np.isfinite(found)] = np.inf
        pressing_G = np.maximum.reduceat(left_N[taking], firsts)
        chosen = int(np.argmax(np.where(earliest_G == earliest_G.min(), pressing_G, -np.inf)))
        found[chosen] = earliest_G[chosen]
        until_N[machines[chosen]] = earliest_G[chosen] + seconds_G[chosen]
        left_N[machines[chosen]] -= seconds_G[chosen]
    return found
