"""The one evaluator: what a step takes with given pipelines, what limits it, and the plan that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from fusionai.graph.model import WeightKey
from fusionai.graph.shared_weights import repeated
from fusionai.scheduling.end_of_step import EndOfStep, end_of_step
from fusionai.scheduling.estimator import training_memory_bytes, update_s
from fusionai.scheduling.explain import Bottleneck, explanation
from fusionai.scheduling.links import Indices
from fusionai.scheduling.plan import PRIVATE_LINE, PipelinePlan, Plan, StagePlan, StagePrediction
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.stage_costs import TrainedWeights
from fusionai.scheduling.worked_pipeline import PipelineChoice, WorkedPipeline, as_it_is, needs_bytes, worked_through


@dataclass(frozen=True)
class Evaluated:
    """Pipelines together, and what a step takes with them."""

    problem: TrainingProblem
    pipelines: tuple[WorkedPipeline, ...]
    end: EndOfStep

    @cached_property
    def pipelines_s(self) -> float:
        """Return the seconds of the slowest pipeline."""
        return max(each.times.makespan_s for each in self.pipelines)

    @property
    def step_s(self) -> float:
        """Return the seconds of a step."""
        return self.pipelines_s + self.end.seconds

    @cached_property
    def needs_bytes(self) -> dict[int, float]:
        """Return the memory that each machine must offer, by its number, with the margin of estimates."""
        return needs_bytes(self.problem, self.pipelines)

    @cached_property
    def overloaded(self) -> dict[int, float]:
        """Return the machines that offer too little, by number, with the share of their need that they offer."""
        offers = {machine: self.problem.machines[machine].device.memory_bytes for machine in self.needs_bytes}
        shares = {machine: offers[machine] / need for machine, need in self.needs_bytes.items() if need}
        return {machine: share for machine, share in shares.items() if share < 1}

    @property
    def possible(self) -> bool:
        """Whether every machine has room for its stages, and all that exchange tensors can be linked."""
        return not self.overloaded and self.step_s < math.inf

    @property
    def holds(self) -> dict[str, frozenset[WeightKey]]:
        """Return the weights that each machine holds, by peer."""
        found: dict[str, frozenset[WeightKey]] = {}
        for each in self.pipelines:
            for peer, stage in zip(self.problem.peers(each.choice.machines), each.cut.stages, strict=True):
                found[peer] = found.get(peer, frozenset()) | stage.keys
        return found

    def plan(self, *, bound_step_s: float | None = None, notes: Sequence[str] = ()) -> Plan:
        """Return the plan, explained. `notes` are further lines of its explanation."""
        return _plan(self, bound_step_s, notes)


def evaluate(
    problem: TrainingProblem, pipelines: Sequence[WorkedPipeline], trained: TrainedWeights | None = None
) -> Evaluated:
    """Return what a step takes with these pipelines.

    `trained`: where the graph's weights are, in parts between positions that include all cuts; None: worked out here.
    """
    if trained is None:
        cuts = sorted({cut for each in pipelines for cut in each.choice.cuts})
        trained = problem.costs.cut(problem.graph, problem.sizes, cuts).trained
    return Evaluated(problem, tuple(pipelines), end_of_step(problem, trained, _holders(trained, pipelines)))


def evaluated_one(
    problem: TrainingProblem, cuts: Sequence[int], machines: Sequence[int], in_flight_limit: int
) -> Evaluated:
    """Evaluate one pipeline that is cut at `cuts` and runs stage k on `machines[k]`.

    1F1B holds at most `in_flight_limit` microbatches; where links are slow, stages hold more as far as memory goes.
    """
    rounds = problem.microbatches
    return evaluate(
        problem,
        [worked_through(problem, PipelineChoice(tuple(machines), tuple(cuts), rounds, in_flight_limit, rounds))],
    )


def evaluated_again(problem: TrainingProblem, plan: Plan) -> Evaluated:
    """Evaluate a plan as it is, microbatches in flight included, on the machines and links of `problem`."""
    rounds = problem.microbatches
    return evaluate(
        problem,
        [
            as_it_is(
                problem,
                PipelineChoice(
                    tuple(problem.number_of[stage.peer] for stage in each.stages),
                    each.cuts,
                    each.microbatches,
                    rounds,
                    rounds,
                ),
                [stage.in_flight for stage in each.stages],
            )
            for each in plan.pipelines
        ],
    )


def _holders(trained: TrainedWeights, pipelines: Sequence[WorkedPipeline]) -> Indices:
    """Return (R, A): the machine that holds each part in each pipeline."""
    bounds = np.asarray(trained.bounds)
    table = np.empty((len(pipelines), len(bounds) - 1), dtype=np.int64)
    for row, each in zip(table, pipelines, strict=True):
        stage_A = np.searchsorted(np.asarray(each.choice.cuts), bounds[:-1], side="right")
        row[:] = np.asarray(each.choice.machines)[stage_A]
    return table


# --- the plan ---------------------------------------------------------------------------------------------------------


def _plan(found: Evaluated, bound_step_s: float | None, notes: Sequence[str]) -> Plan:
    problem = found.problem
    updates_s = _updates_s(found)
    pipelines = tuple(
        PipelinePlan(_stages(problem, each, updates), each.choice.microbatches, each.times.makespan_s)
        for each, updates in zip(found.pipelines, updates_s, strict=True)
    )
    used = {stage.peer for pipeline in pipelines for stage in pipeline.stages}
    busy_s = [_computing_s(each, updates) for each, updates in zip(found.pipelines, updates_s, strict=True)]
    bottleneck = _bottleneck(found, busy_s)
    return Plan(
        graph_hash=problem.graph_hash,
        sizes=problem.sizes,
        microbatches=problem.microbatches,
        privacy=problem.privacy,
        owner=problem.owner.peer if problem.owner else "",
        pipelines=pipelines,
        end_of_step_s=found.end.seconds,
        predicted_step_s=found.step_s,
        bottleneck=bottleneck,
        bound_step_s=bound_step_s,
        left_out=tuple(each.peer for each in problem.members if each.peer not in used),
        explanation=(
            *explanation(
                pipelines,
                problem.graph.nodes,
                {each.peer: each for each in problem.machines},
                [
                    {problem.machines[machine].peer: seconds / found.step_s for machine, seconds in each.items()}
                    for each in busy_s
                ],
                found.step_s,
                found.end.seconds,
                bottleneck,
            ),
            *([PRIVATE_LINE] if problem.privacy == "private" else []),
            *notes,
        ),
    )


def _stages(problem: TrainingProblem, each: WorkedPipeline, updates_s: Sequence[float]) -> tuple[StagePlan, ...]:
    return tuple(
        StagePlan(
            stage=stage,
            peer=problem.machines[machine].peer,
            start=start,
            stop=stop,
            in_flight=each.in_flight[stage],
            predicted=StagePrediction(
                forward_s=each.seconds[stage][0],
                backward_s=each.seconds[stage][1],
                update_s=updates_s[stage],
                memory_bytes=training_memory_bytes(
                    each.cut.costs[stage],
                    problem.machines[machine].device,
                    each.in_flight[stage],
                    problem.optimizer_states,
                ),
                send_s=each.send_s[stage],
            ),
        )
        for stage, (machine, (start, stop)) in enumerate(
            zip(each.choice.machines, pairwise(each.cut.bounds), strict=True)
        )
    )


def _updates_s(found: Evaluated) -> list[list[float]]:
    """Return, by pipeline and stage, the seconds of the update; a weight is updated in its machine's first stage."""
    problem, updates = found.problem, []
    for each in found.pipelines:
        machines, known = each.choice.machines, [0] * len(each.choice.machines)
        if len(set(machines)) < len(machines):
            known = [again.trainable for again in repeated(each.cut.stages, machines)]
        updates.append(
            [
                update_s(cost.trainable_bytes - again, problem.machines[machine].device, problem.optimizer_states)
                for cost, again, machine in zip(each.cut.costs, known, machines, strict=True)
            ]
        )
    return updates


def _computing_s(each: WorkedPipeline, updates_s: Sequence[float]) -> dict[int, float]:
    """Return the seconds of a step in which each machine computes: its passes, and the update once."""
    found = {int(machine): seconds for machine, seconds in each.times.busy_s.items()}
    for machine, seconds in zip(each.choice.machines, updates_s, strict=True):
        found[machine] += seconds
    return found


def _bottleneck(found: Evaluated, computing_s: Sequence[dict[int, float]]) -> str:
    """Name what is busy most of a step: a machine, link or line of the slowest pipeline, or the end of the step."""
    slowest = max(range(len(found.pipelines)), key=lambda place: found.pipelines[place].times.makespan_s)
    times = found.pipelines[slowest].times
    names = {str(number): each.name for number, each in enumerate(found.problem.machines)}
    owner = found.problem.owner
    return Bottleneck(
        computing_s={names[str(machine)]: seconds for machine, seconds in computing_s[slowest].items()},
        links_s={(names[one], names[other]): seconds for (one, other), seconds in times.link_busy_s.items()},
        lines_s={(names[machine], way): seconds for (machine, way), seconds in times.line_busy_s.items()},
        summed_s=found.end.summed_s,
        committed_s=found.end.committed_s,
        pipelines=len(found.pipelines),
        driver=owner.name if owner else "the driver",
    ).words(found.step_s)
