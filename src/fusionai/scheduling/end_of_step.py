"""The end of a step: gradients are summed among the holders of a weight, machines report, and weights are updated.

Plans and simulated steps take it from here. `search.end_estimate` has a quicker estimate for candidates, and the
analysis of the headline has closed formulas of its own.

The gradients of one weight go around a ring of its holders. A ring all-reduce of b bytes over R holders takes
2 (R - 1) rounds of b / R bytes (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"). Each round is as long as the slowest link of the ring needs. Within one pipeline the holders of a tied
weight send it to each other whole instead, as the training runtime does (`training.tied_gradients`).

A machine is in one sum at a time, in the order of `sums_in_turn`. When everything is summed, each machine reports to
the driver, hears from it, and updates its weights.

Array suffixes: A = parts of the graph, R = pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from fusionai.scheduling.estimator import update_passes
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.stage_costs import TrainedWeights
from fusionai.scheduling.sums_in_turn import begin_s

Machine = TypeVar("Machine", bound=Hashable)

Rates: TypeAlias = Callable[[Sequence[Machine], Sequence[Machine]], tuple[Floats, Floats]]
"""Bytes per second and one-way latencies in seconds, from each source to its target."""


@dataclass(frozen=True, slots=True)
class GradientSum(Generic[Machine]):
    """Gradients that the same machines sum."""

    machines: tuple[Machine, ...]
    """At least two, none twice, in the order of the ring."""
    size_bytes: float
    one_pipeline: bool
    """Whether all holders are stages of one pipeline: then each sends everything to every other."""

    def sends(self) -> list[tuple[Machine, Machine, float]]:
        """Return source, target and bytes of all that is sent."""
        count = len(self.machines)
        if self.one_pipeline:
            return [(a, b, self.size_bytes) for a in self.machines for b in self.machines if a != b]
        following = (*self.machines[1:], self.machines[0])
        sent_bytes = 2 * (count - 1) * self.size_bytes / count
        return [(a, b, sent_bytes) for a, b in zip(self.machines, following, strict=True)]

    def seconds(self, rates: Rates[Machine]) -> float:
        """Return the seconds that the sum takes, infinite when two of its machines cannot be linked."""
        count = len(self.machines)
        if self.one_pipeline:
            pairs = [(a, b) for a in self.machines for b in self.machines if a != b]
            sources, targets = [a for a, _ in pairs], [b for _, b in pairs]
            rounds, size_bytes = 1, self.size_bytes
        else:
            sources, targets = list(self.machines), [*self.machines[1:], self.machines[0]]
            rounds, size_bytes = 2 * (count - 1), self.size_bytes / count
        bandwidth, delay_s = rates(sources, targets)
        with np.errstate(divide="ignore"):
            return rounds * float((size_bytes / bandwidth + delay_s).max())


def summed_s(
    sums: Sequence[GradientSum[Machine]], rates: Rates[Machine], ready_s: Mapping[Machine, float] | None = None
) -> float:
    """Return when everything is summed, 0 if nothing is; infinite if machines cannot be linked.

    `ready_s`: by machine, when it may begin to sum; None: all may at 0.
    """
    seconds_G = np.asarray([each.seconds(rates) for each in sums])
    if not np.isfinite(seconds_G).all():
        return float("inf")
    numbers = {machine: number for number, machine in enumerate({m: None for each in sums for m in each.machines})}
    machines = [np.asarray([numbers[machine] for machine in each.machines]) for each in sums]
    ready_G = np.zeros(len(sums))
    if ready_s is not None:
        ready_G = np.asarray([max(ready_s[machine] for machine in each.machines) for each in sums])
    return float((begin_s(ready_G, machines, seconds_G) + seconds_G).max(initial=0.0))


def merged(sums: Iterable[GradientSum[Machine]]) -> list[GradientSum[Machine]]:
    """Return the sums with those of the same ring together; a sum of one machine is none."""
    sizes: dict[tuple[tuple[Machine, ...], bool], float] = {}
    for each in sums:
        if len(each.machines) > 1:
            key = each.machines, each.one_pipeline
            sizes[key] = sizes.get(key, 0.0) + each.size_bytes
    return [GradientSum(machines, size, one) for (machines, one), size in sizes.items()]


# --- of a plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndOfStep:
    """Seconds between the last backward and the next step's first forward."""

    summed_s: float
    """Seconds that summing takes: of gradients over pipelines, and of those of tied weights."""
    committed_s: float
    """Seconds that reporting to the driver, hearing from it, and updating take."""

    @property
    def seconds(self) -> float:
        """Return both together."""
        return self.summed_s + self.committed_s


def end_of_step(problem: TrainingProblem, trained: TrainedWeights, holders_RA: Indices) -> EndOfStep:
    """Return the end of a step of a plan, all machines done with their passes at the same time.

    `holders_RA`: the machine that holds each part in each pipeline, the owner's parts among them.
    """
    return EndOfStep(
        summed_s(gradient_sums(trained, holders_RA), rates_of(problem)), committed_s(problem, trained, holders_RA)
    )


def rates_of(problem: TrainingProblem) -> Rates[int]:
    """Return the rates of a problem's links; a bandwidth is 0 where no link is possible."""

    def rates(sources: Sequence[int], targets: Sequence[int]) -> tuple[Floats, Floats]:
        source, target = np.asarray(sources), np.asarray(targets)
        return problem.bandwidths(source, target), problem.delays(source, target)

    return rates


def gradient_sums(trained: TrainedWeights, holders_RA: Indices) -> list[GradientSum[int]]:
    """Return the sums of a plan's gradients, weights of the same ring together."""
    one = len(holders_RA) == 1
    read_by: list[tuple[float, tuple[int, ...]]] = [
        (float(size), (part,)) for part, size in enumerate(trained.single_bytes) if size > 0 and not one
    ]
    read_by += [(float(size), parts) for size, parts in trained.tied]
    return merged(GradientSum(ring_of(holders_RA, parts), size, one) for size, parts in read_by)


def ring_of(holders_RA: Indices, parts: Sequence[int]) -> tuple[int, ...]:
    """Return the machines that hold a weight that `parts` read, pipeline by pipeline."""
    if len(parts) == 1:
        return tuple(dict.fromkeys(holders_RA[:, parts[0]].tolist()))
    return tuple(dict.fromkeys(holders_RA[:, list(parts)].ravel().tolist()))


def committed_s(problem: TrainingProblem, trained: TrainedWeights, holders_RA: Indices) -> float:
    """Return the seconds in which every machine reports to the driver, hears from it, and updates its weights.

    A machine that holds a weight several times updates it once. What the owner's machine holds is the same in every
    pipeline.
    """
    held = np.zeros(len(problem.machines))
    size_A = trained.single_bytes.copy()
    for size, parts in trained.tied:
        size_A[parts[0]] += size
    np.add.at(held, holders_RA, np.broadcast_to(size_A, holders_RA.shape))
    for size, parts in trained.tied:
        for place, part in enumerate(parts[1:], start=1):
            here = holders_RA[:, part]
            known = (holders_RA[:, list(parts[:place])] == here[:, None]).any(axis=1)
            np.add.at(held, here[~known], size)
    machines = np.unique(holders_RA)
    times = np.where(machines == (problem.owner_index if problem.pinned else -1), 1 / len(holders_RA), 1.0)
    seconds = update_passes(problem.optimizer_states) * held[machines] * times / problem.update_bytes_per_s[machines]
    if problem.owner_index is not None:
        seconds = seconds + 2 * problem.delays(np.full(len(machines), problem.owner_index), machines)
    return float(seconds.max())
