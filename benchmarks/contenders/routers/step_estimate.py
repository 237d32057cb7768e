"""How long a step takes when some machines hold some stages, in a closed formula: quick, to compare many.

Microbatches are taken as a fluid: a stage's holders work them off together, each as fast as it computes or as its links
to the holders of the neighbour stages carry them. The slowest stage gives the period between microbatches. A stage
that can hold few at once gives a longer one where the way there and back is long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from contenders.routers.routed_job import RoutedJob
from fusionai.scheduling.links import Floats


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """Seconds of a step, and what they are made of."""

    latency_s: float
    """Of one microbatch there and back on the fastest path."""
    period_s: float
    """Between one microbatch and the next."""
    sum_s: float
    """Of summing gradients among holders."""
    commit_s: float
    """Of reporting and updating."""
    microbatches: int
    limit: str
    """What gives the period: "stage 3", "links of stage 3", "memory of stage 3"."""

    @property
    def step_s(self) -> float:
        """Return the seconds of a step."""
        return self.latency_s + (self.microbatches - 1) * self.period_s + self.sum_s + self.commit_s


def step_estimate(job: RoutedJob, holders: Sequence[Sequence[int]]) -> StepEstimate:
    """Return the estimate; its times are infinite when a stage has no holder or no link from the one before."""
    if any(not each for each in holders):
        return StepEstimate(math.inf, math.inf, 0.0, 0.0, job.microbatches, "a stage without a holder")
    arrays = [np.asarray(each, dtype=np.int64) for each in holders]
    seats = seats_of(holders)
    both = [job.forward_s[stage, each] + job.backward_s[stage, each] for stage, each in enumerate(arrays)]
    computing = both if len(seats) == sum(map(len, holders)) else _shared(job, holders, seats)
    # Of each holder, the seconds of a microbatch on its busiest part: computing, or its links to a neighbour stage.
    busiest = [each.copy() for each in computing]
    onward = both[-1]
    trips = [float(onward.min())]
    for target in reversed(range(1, job.stages)):
        one, other = arrays[target - 1][:, None], arrays[target][None]
        out, home = job.bandwidth[one, other], job.bandwidth[other, one]
        size, gradient = job.forward_bytes[target], job.gradient_bytes[target]
        if (size or gradient) and not (out > 0).any():
            return StepEstimate(math.inf, math.inf, 0.0, 0.0, job.microbatches, f"no link into stage {target}")
        for stage, axis in ((target - 1, 1), (target, 0)):
            with np.errstate(divide="ignore"):
                links_s = np.maximum(size / out.sum(axis=axis), gradient / home.sum(axis=axis))
            busiest[stage] = np.maximum(busiest[stage], links_s)
        with np.errstate(divide="ignore", invalid="ignore"):
            hop = np.where(out > 0, size / out + gradient / home, np.inf)
        hop = np.nan_to_num(hop, nan=0.0, posinf=np.inf) + job.delay_s[one, other] + job.delay_s[other, one]
        # From the last stage back: the fastest way from each holder to the end and home.
        onward = both[target - 1] + (hop + onward[None]).min(axis=1)
        trips.append(float(onward.min()))
    period_s, limit = 0.0, ""
    for stage, (each, alone) in enumerate(zip(busiest, computing, strict=True)):
        stage_s = 1 / float((1 / each).sum())
        if stage_s > period_s:
            period_s = stage_s
            limit = f"links of stage {stage}" if (each > alone).any() else f"stage {stage}"
    for stage, trip_s in enumerate(reversed(trips)):
        room = sum(job.room(stage, machine, seats[machine]) for machine in holders[stage])
        if not room:
            return StepEstimate(math.inf, math.inf, 0.0, 0.0, job.microbatches, f"memory of stage {stage}")
        if trip_s > period_s * room:
            period_s, limit = trip_s / room, f"memory of stage {stage}"
    driver = job.driver
    commit_s = 0.0
    for machine, stages in seats.items():
        away_s = float(job.delay_s[driver, machine] + job.delay_s[machine, driver]) if driver >= 0 else 0.0
        commit_s = max(commit_s, away_s + sum(float(job.update_s[stage, machine]) for stage in stages))
    return StepEstimate(trips[-1], period_s, job.sum_s(holders), commit_s, job.microbatches, limit)


def seats_of(holders: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Return the stages of each machine that holds any."""
    seats: dict[int, list[int]] = {}
    for stage, machines in enumerate(holders):
        for machine in machines:
            seats.setdefault(machine, []).append(stage)
    return seats


def _shared(job: RoutedJob, holders: Sequence[Sequence[int]], seats: Mapping[int, Sequence[int]]) -> list[Floats]:
    """Return by stage and holder the seconds between two microbatches of a machine that all its stages share.

    Each of its stages is taken to get as many as the others, which errs on the slow side where another holder helps.
    """
    whole = {machine: sum(job.pass_s(stage, machine) for stage in stages) for machine, stages in seats.items()}
    return [np.asarray([whole[machine] for machine in machines]) for machines in holders]
