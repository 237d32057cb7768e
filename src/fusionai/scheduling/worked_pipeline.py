"""One pipeline worked through: its stages are really cut and costed, and its 1F1B schedule is executed.

The searches for plans reckon with sums over small segments and an ideal pipeline. Here seconds, memory and transfers
are those of the stages that will run.

Where several pipelines share the owner's machine, each is reckoned with its part of it: passes and transfers there take
longer by the inverse of the pipeline's share of the microbatches. That conserves the owner's capacity and errs on the
slow side while the other pipelines are idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusionai.graph.shared_weights import repeated, waiting_bytes
from fusionai.scheduling.estimator import backward_s, deferred_s, forward_s, heap_microbatches
from fusionai.scheduling.in_flight import SLACKS, WORTH_MEMORY, busiest_s, least_held, round_trips_s, widened
from fusionai.scheduling.pipeline import Edge, PipelineTimes, StageTimes, executed_microbatches, executed_round
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.stage_costs import CutGraph

_NEVER = PipelineTimes(math.inf, {}, {}, {})


@dataclass(frozen=True, slots=True)
class PipelineChoice:
    """Where a pipeline is cut, and which machine runs which stage."""

    machines: tuple[int, ...]
    """By stage, the owner's machine among them."""
    cuts: tuple[int, ...]
    """Node positions."""
    microbatches: int
    """Its part of each step's."""
    in_flight_limit: int
    """Most microbatches that a stage holds for 1F1B."""
    widest: int
    """Most microbatches that a stage holds where links are slow; at least `in_flight_limit`."""


@dataclass(frozen=True, slots=True)
class WorkedPipeline:
    """A pipeline with its schedule."""

    choice: PipelineChoice
    cut: CutGraph
    seconds: tuple[tuple[float, float], ...]
    """Forward and backward of one microbatch, by stage, nothing else being on the machine."""
    send_s: tuple[float, ...]
    """By stage, the seconds for which its sends of one microbatch occupy links."""
    in_flight: tuple[int, ...]
    times: PipelineTimes
    """By the numbers of machines, written as text."""

    @property
    def possible(self) -> bool:
        """Whether its machines hold their stages and can be linked. Of the owner's machine all pipelines decide."""
        return math.isfinite(self.times.makespan_s)


def worked_through(problem: TrainingProblem, choice: PipelineChoice) -> WorkedPipeline:
    """Work a pipeline's schedule through.

    Stages hold as many microbatches as 1F1B asks for, or as their machines have room for. Where links are slow they
    hold more, as far as memory goes and the pipeline becomes faster. A pipeline that does not fit takes infinitely
    long.
    """
    stages = _Stages(problem, choice)
    chosen = stages.least_in_flight()
    if stages.overloaded(chosen):
        return stages.worked(chosen, _NEVER)
    times = stages.times(chosen)
    for slack in SLACKS:
        wider = stages.wider(chosen, slack)
        if wider != chosen and (tried := stages.times(wider)).makespan_s < WORTH_MEMORY * times.makespan_s:
            chosen, times = wider, tried
    return stages.worked(chosen, times)


def as_it_is(problem: TrainingProblem, choice: PipelineChoice, in_flight: Sequence[int]) -> WorkedPipeline:
    """Work a pipeline's schedule through whose stages hold `in_flight` microbatches, whether they fit or not."""
    stages = _Stages(problem, choice)
    return stages.worked(tuple(in_flight), stages.times(in_flight))


def needs_bytes(problem: TrainingProblem, pipelines: Iterable[WorkedPipeline]) -> dict[int, float]:
    """Return the memory that each machine must offer, by its number, with the margin of estimates.

    Stages that are the same in several pipelines are there once, with what all of them have in flight.
    """
    held: dict[int, dict[tuple[int, int], tuple[CutGraph, int, int]]] = {}
    for each in pipelines:
        for stage, (machine, count) in enumerate(zip(each.choice.machines, each.in_flight, strict=True)):
            ends = each.cut.bounds[stage], each.cut.bounds[stage + 1]
            stages = held.setdefault(machine, {})
            stages[ends] = each.cut, stage, count + (stages[ends][2] if ends in stages else 0)
    return {machine: _need_bytes(problem, machine, list(stages.values())) for machine, stages in held.items()}


def _need_bytes(problem: TrainingProblem, machine: int, stages: Sequence[tuple[CutGraph, int, int]]) -> float:
    """Return what a machine must offer for stages, each with the microbatches that it holds."""
    heap, states = heap_microbatches(problem.machines[machine].device), problem.optimizer_states
    need, transient = 0.0, 0
    for cut, stage, count in stages:
        cost = cut.costs[stage]
        # One stage at a time computes, and a weight that two of them share is held once.
        transient = max(transient, cost.transient_bytes)
        need += cost.training_bytes(count + heap, states) - cost.transient_bytes
    if len(stages) > 1:
        weights = [cut.stages[stage] for cut, stage, _ in stages]
        again = repeated(weights, [machine] * len(stages))
        need -= sum((2 + states) * each.trainable + each.other for each in again)
        if any(each.trainable for each in again):
            need += waiting_bytes(weights, [count for *_, count in stages])
    return (need + transient) * MEMORY_MARGIN


class _Stages:
    """The stages of one pipeline and what joins them."""

    def __init__(self, problem: TrainingProblem, choice: PipelineChoice) -> None:
        self._problem, self._choice = problem, choice
        self._machines = choice.machines
        self._cut = problem.costs.cut(problem.graph, problem.sizes, choice.cuts)
        self._owner = problem.owner_index if problem.pinned else None
        self._sharing = problem.microbatches / choice.microbatches
        precision = problem.precision
        pairs = [
            (cost, problem.machines[machine].device)
            for cost, machine in zip(self._cut.costs, self._machines, strict=True)
        ]
        self._seconds = tuple((forward_s(*pair, precision), backward_s(*pair, precision)) for pair in pairs)
        self._deferred_s = [
            min(seconds[1], deferred_s(*pair, precision)) if problem.split_backward else 0.0
            for pair, seconds in zip(pairs, self._seconds, strict=True)
        ]
        # Machines by their place, so that like pipelines are worked through once.
        self._names = {machine: str(place) for place, machine in enumerate(dict.fromkeys(self._machines))}
        self._edges = self._make_edges()

    def _slower(self, *machines: int) -> float:
        """Return how many times longer everything takes on these machines or between them."""
        return self._sharing if self._owner in machines else 1.0

    def _make_edges(self) -> list[Edge]:
        problem, edges = self._problem, []
        for (source, target), (forward, gradients) in self._cut.crossing.items():
            one, other = self._machines[source], self._machines[target]
            out, home = problem.link(one, other), problem.link(other, one)
            if not (out.bandwidth_bytes_per_s and home.bandwidth_bytes_per_s):
                edges.append(Edge(source, target, math.inf, math.inf, out.rtt_s / 2))
                continue
            slower = self._slower(one, other)
            edges.append(
                Edge(
                    source,
                    target,
                    slower * forward / out.bandwidth_bytes_per_s,
                    slower * gradients / home.bandwidth_bytes_per_s if gradients else None,
                    out.rtt_s / 2,
                    problem.lines_s(slower * forward, one, other),
                    problem.lines_s(slower * gradients, other, one),
                )
            )
        return edges

    def _stage_times(self, in_flight: Sequence[int]) -> tuple[StageTimes, ...]:
        found = []
        for machine, seconds, held, deferred in zip(
            self._machines, self._seconds, in_flight, self._deferred_s, strict=True
        ):
            slower = self._slower(machine)
            forward, backward = seconds
            found.append(StageTimes(self._names[machine], slower * forward, slower * backward, held, slower * deferred))
        return tuple(found)

    def times(self, in_flight: Sequence[int]) -> PipelineTimes:
        """Execute the schedule."""
        if any(math.isinf(edge.forward_s) for edge in self._edges):
            return _NEVER
        microbatches = self._choice.microbatches
        if len(self._machines) == 1:
            whole = microbatches * sum(self._seconds[0])
            return PipelineTimes(whole, {str(self._machines[0]): whole}, {}, {})
        stages = self._stage_times(in_flight)
        executed = executed_microbatches(stages, microbatches)
        key = (stages, tuple(self._edges), executed, executed == microbatches)
        known = self._problem.schedules
        if (round_ := known.get(key)) is None:
            round_ = known[key] = executed_round(stages, self._edges, microbatches)
        found = round_.times(microbatches)
        back = {name: str(machine) for machine, name in self._names.items()}
        return PipelineTimes(
            found.makespan_s,
            {back[name]: seconds for name, seconds in found.busy_s.items()},
            {(back[one], back[other]): seconds for (one, other), seconds in found.link_busy_s.items()},
            {(back[machine], direction): seconds for (machine, direction), seconds in found.line_busy_s.items()},
        )

    def least_in_flight(self) -> tuple[int, ...]:
        """Return what 1F1B holds: as many microbatches as there are stages to go, or fewer where there is no room."""
        choice, one = self._choice, [1] * len(self._machines)
        most = [
            self._room(stage, one) if self._machines.count(machine) == 1 else choice.microbatches
            for stage, machine in enumerate(self._machines)
        ]
        return least_held(most, min(choice.in_flight_limit, choice.microbatches))

    def wider(self, in_flight: Sequence[int], slack: float) -> tuple[int, ...]:
        """Return how many each stage must hold to be busy while a microbatch is on its way there and back."""
        stages = self._stage_times(in_flight)
        most = [self._room(stage, in_flight) for stage in range(len(stages))]
        trips_s, period_s = round_trips_s(stages, self._edges), busiest_s(stages, self._edges)
        limit = min(self._choice.widest, self._choice.microbatches)
        return widened(in_flight, most, limit, trips_s, period_s, slack)

    def _room(self, stage: int, in_flight: Sequence[int]) -> int:
        """Return the most microbatches that a stage can hold, its machine's other stages as they are."""
        machine, saved = self._machines[stage], self._cut.costs[stage].saved_bytes * MEMORY_MARGIN
        offered = self._problem.machines[machine].device.memory_bytes / self._slower(machine)
        spare = offered - self._need_bytes(machine, in_flight)
        # Stages that share a machine widen at the same time.
        spare /= self._machines.count(machine)
        return in_flight[stage] + (int(spare / saved) if saved and spare > 0 else 0)

    def _need_bytes(self, machine: int, in_flight: Sequence[int]) -> float:
        stages = [(self._cut, stage, in_flight[stage]) for stage, each in enumerate(self._machines) if each == machine]
        return _need_bytes(self._problem, machine, stages)

    def overloaded(self, in_flight: Sequence[int]) -> bool:
        """Whether a machine offers too little; of the owner's machine all pipelines together decide."""
        return any(
            self._need_bytes(machine, in_flight) > self._problem.machines[machine].device.memory_bytes
            for machine in self._names
            if machine != self._owner
        )

    def worked(self, in_flight: tuple[int, ...], times: PipelineTimes) -> WorkedPipeline:
        """Return the pipeline with a schedule."""
        sends = [0.0] * len(self._machines)
        for edge in self._edges:
            sends[edge.source] += edge.forward_s
            sends[edge.target] += edge.backward_s or 0.0
        return WorkedPipeline(self._choice, self._cut, self._seconds, tuple(sends), in_flight, times)
