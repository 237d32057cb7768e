"""The end of a step of equal pipelines: gradients are summed over them, every machine reports and updates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusionai.scheduling.estimator import update_passes
from fusionai.scheduling.links import Floats
from fusionai.simulation.codecs import Codec
from fusionai.simulation.headline.card_clusters import Cluster
from fusionai.simulation.headline.costs import ADAM_COPIES, Costs


@dataclass(frozen=True, slots=True, eq=False)
class StepEndFormulas:
    """Closed formulas for what follows the last backward of a step; in inference nothing does."""

    costs: Costs
    cluster: Cluster
    codec: Codec
    weight_bytes_P: Floats
    """Bytes of all weights before a position."""

    def sum_s(self, pipelines: NDArray[np.int64], bounds: Sequence[int]) -> Floats:
        """Return the seconds of summing the gradients of stages between `bounds`, for each number of pipelines.

        Stages sum beside each other, each over its copies in all pipelines. Stages that hold tied weights also send
        each other their gradients.
        """
        if self.costs.task == "inference":
            return np.zeros(len(pipelines))
        tied_s = self.costs.tied_bytes / self.cluster.bytes_per_s + self.cluster.latency_s
        holders = {bisect_right(bounds, segment) - 1 for segment in self.costs.tied_segments}
        exchange_s = [tied_s if len(holders) > 1 and stage in holders else 0.0 for stage in range(len(bounds) - 1)]
        held = np.diff(self.weight_bytes_P[list(bounds)])
        each_s = [self.copies_s(pipelines, float(size)) + more for size, more in zip(held, exchange_s, strict=True)]
        return np.asarray(np.max(each_s, axis=0), dtype=np.float64)

    def copies_s(self, pipelines: NDArray[np.int64], held_bytes: float) -> Floats:
        """Return the seconds of summing gradients of so many bytes over pipelines.

        A ring all-reduce is 2 (P - 1) rounds of 1 / P of the bytes (Patarasuk and Yuan 2009). What Top-K keeps differs
        from machine to machine, so its sums are gathered whole: P - 1 rounds of all that each one sends. The shorter
        of the two is taken.
        """
        if self.costs.task == "inference":
            return np.zeros(len(pipelines))
        others, rate, delay_s = pipelines - 1, self.cluster.bytes_per_s, self.cluster.latency_s
        ring_s = 2 * others * (held_bytes / pipelines / rate + delay_s)
        gather_s = others * (self.codec.sent_bytes(held_bytes) / rate + delay_s)
        return np.asarray(np.minimum(ring_s, gather_s), dtype=np.float64)

    def update_s(self, held_bytes: float) -> float:
        """Return the seconds of reporting and of updating the weights of a stage."""
        if self.costs.task == "inference":
            return 0.0
        passes = update_passes(ADAM_COPIES)
        return passes * held_bytes / self.cluster.device.memory_bytes_per_s + 2 * self.cluster.latency_s
