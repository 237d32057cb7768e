"""The end of a step: gradients are summed among the holders of a weight, machines report, the driver commits.

Within one pipeline, holders of a tied weight send it to each other whole, as the training runtime does. Over pipelines
the sum is a ring all-reduce (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"): of P machines each sends 2 (P - 1) pieces of 1 / P to the next, all at the pace of the slowest link. A
machine is in one sum at a time, in the order of `scheduling.sums_in_turn`, and a sum begins when all its machines have
finished their last backward, so late stages sum while early ones still compute. The rest is as
`fusionai.scheduling.evaluation` reckons: when everything is summed, each machine's report and the answer take a round
trip, and its update follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.estimator import delay_s, send_s
from fusionai.scheduling.sums_in_turn import begin_s
from fusionai.simulation.placed_stages import PlacedStages
from fusionai.simulation.simulated_links import SimulatedLinks
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
    channels = assembly.channels
    sends: list[tuple[str, str, float]] = []
    waiting: list[tuple[float, float, tuple[str, ...]]] = []
    for group in groups:
        stages = [assembly.places[place] for place in group.stages if place in assembly.places]
        machines = tuple(dict.fromkeys(stage.machine for stage in stages))
        if len(machines) > 1:
            one_pipeline = len({stage.pipeline for stage in stages}) == 1
            exchange = whole_exchange if one_pipeline else ring_all_reduce
            seconds, sent = exchange(channels, machines, group.size_bytes)
            sends += sent
            waiting.append((max(free_s[machine] for machine in machines), seconds, machines))
    everybody = dict.fromkeys(machine for *_, machines in waiting for machine in machines)
    numbers = {machine: number for number, machine in enumerate(everybody)}
    ready_G, seconds_G = (np.asarray([each[place] for each in waiting]) for place in (0, 1))
    taking = [np.asarray([numbers[machine] for machine in machines]) for *_, machines in waiting]
    summed_s = max([passes_end_s, *(begin_s(ready_G, taking, seconds_G) + seconds_G).tolist()])
    updates: dict[str, float] = {}
    for stage in assembly.stages:
        seconds = stage.load.update_s * factors.get(stage.machine, 1.0)
        updates[stage.machine] = updates.get(stage.machine, 0.0) + seconds
    slowest_s = max(channels.profile(driver, machine).rtt_s + seconds for machine, seconds in updates.items())
    return SumsAndCommit(summed_s, summed_s + slowest_s, tuple(sends), updates)


def ring_all_reduce(
    channels: SimulatedLinks, machines: Sequence[str], size_bytes: float
) -> tuple[float, list[tuple[str, str, float]]]:
    """Return the seconds of a ring all-reduce, and what each machine sends to which."""
    count = len(machines)
    piece_bytes = size_bytes / count
    pairs = [(machine, machines[(place + 1) % count]) for place, machine in enumerate(machines)]
    profiles = [channels.profile(*pair) for pair in pairs]
    round_s = max(send_s(piece_bytes, profile) + delay_s(profile) for profile in profiles)
    rounds = 2 * (count - 1)
    return rounds * round_s, [(*pair, rounds * piece_bytes) for pair in pairs]


def whole_exchange(
    channels: SimulatedLinks, machines: Sequence[str], size_bytes: float
) -> tuple[float, list[tuple[str, str, float]]]:
    """Return the seconds in which each machine sends its gradients whole to every other, and what is sent."""
    pairs = [(one, other) for one in machines for other in machines if one != other]
    profiles = [channels.profile(*pair) for pair in pairs]
    seconds = max(send_s(size_bytes, profile) + delay_s(profile) for profile in profiles)
    return seconds, [(*pair, size_bytes) for pair in pairs]
