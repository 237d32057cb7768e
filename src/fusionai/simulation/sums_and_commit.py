"""The end of a simulated step: gradients are summed among the holders of a weight, machines report, the driver commits.

Sums take what `fusionai.scheduling.end_of_step` says. Here a sum begins when all its machines have finished their last
backward, so late stages sum while early ones still compute. When everything is summed, each machine's report and the
answer take a round trip, and its update follows.
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
    """When a step's phases end, seconds since its start, and what the last ones send and compute."""

    summed_s: float
    committed_s: float
    """When the slowest machine has updated: the next step begins."""
    sends: tuple[tuple[str, str, float], ...]
    """Source, target and bytes."""
    update_s: dict[str, float]
    """By machine."""


def sums_and_commit(
    assembly: PlacedStages,
    groups: Sequence[WeightGroup],
    driver: str,
    *,
    free_s: Mapping[str, float],
    passes_end_s: float,
    factors: Mapping[str, float],
) -> SumsAndCommit:
    """Return how a step ends whose passes are done; `free_s` says when each machine's were."""
    profile = assembly.channels.profile

    def rates(sources: Sequence[str], targets: Sequence[str]) -> tuple[Floats, Floats]:
        links = [profile(source, target) for source, target in zip(sources, targets, strict=True)]
        return np.asarray([link.bandwidth_bytes_per_s for link in links]), np.asarray([delay_s(link) for link in links])

    sums: list[GradientSum[str]] = []
    for group in groups:
        stages = [assembly.places[place] for place in group.stages if place in assembly.places]
        machines = tuple(dict.fromkeys(stage.machine for stage in stages))
        if len(machines) > 1:
            one_pipeline = len({stage.pipeline for stage in stages}) == 1
            sums.append(GradientSum(machines, group.size_bytes, one_pipeline))
    all_summed_s = max(passes_end_s, summed_s(sums, rates, free_s))
    updates: dict[str, float] = {}
    for stage in assembly.stages:
        seconds = stage.load.update_s * factors.get(stage.machine, 1.0)
        updates[stage.machine] = updates.get(stage.machine, 0.0) + seconds
    slowest_s = max(profile(driver, machine).rtt_s + seconds for machine, seconds in updates.items())
    sends = tuple(send for each in sums for send in each.sends())
    return SumsAndCommit(all_summed_s, all_summed_s + slowest_s, sends, updates)
