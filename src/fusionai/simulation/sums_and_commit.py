"""The end of a simulated step: gradients are summed among the holders of a weight, then machines report and update.

The sums are the planner's (`fusionai.scheduling.end_of_step`). Here a sum begins when all its machines have finished
their last backward, so late stages sum while early ones still compute. When everything is summed, each machine's report
and the driver's answer take a round trip, and the machine's update follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.end_of_step import GradientSum, summed_s
from fusionai.scheduling.estimator import delay_s
from fusionai.scheduling.links import Floats
from fusionai.simulation.placed_stages import PlacedStages
from fusionai.simulation.workload import WeightGroup


@dataclass(frozen=True, slots=True)
class SumsAndCommit:
    """When a step's last phases end, in seconds since its start, and what the machines send and compute in them."""

    summed_s: float
    committed_s: float
    """When the slowest machine has updated: the next step begins."""
    sends: tuple[tuple[str, str, float], ...]
    """Source, target and bytes."""
    update_s: dict[str, float]
    """By machine."""


def sums_and_commit(
    placed: PlacedStages,
    groups: Sequence[WeightGroup],
    driver: str,
    *,
    free_s: Mapping[str, float],
    passes_end_s: float,
    factors: Mapping[str, float],
) -> SumsAndCommit:
    """Return how a step ends whose passes are done; `free_s` says when each machine's were."""
    links = placed.channels

    def rates(sources: Sequence[str], targets: Sequence[str]) -> tuple[Floats, Floats]:
        profiles = [links.profile(source, target) for source, target in zip(sources, targets, strict=True)]
        return (
            np.asarray([each.bandwidth_bytes_per_s for each in profiles]),
            np.asarray([delay_s(each) for each in profiles]),
        )

    sums = []
    for group in groups:
        stages = [placed.places[place] for place in group.stages if place in placed.places]
        machines = tuple(dict.fromkeys(stage.machine for stage in stages))
        if len(machines) > 1:
            one_pipeline = len({stage.pipeline for stage in stages}) == 1
            sums.append(GradientSum(machines, group.size_bytes, one_pipeline))
    end_s = max(passes_end_s, summed_s(sums, rates, free_s))
    updates: dict[str, float] = {}
    for stage in placed.stages:
        seconds = stage.load.update_s * factors.get(stage.machine, 1.0)
        updates[stage.machine] = updates.get(stage.machine, 0.0) + seconds
    slowest_s = max(links.profile(driver, machine).rtt_s + seconds for machine, seconds in updates.items())
    sends = tuple(sent for each in sums for sent in each.sends())
    return SumsAndCommit(end_s, end_s + slowest_s, sends, updates)
