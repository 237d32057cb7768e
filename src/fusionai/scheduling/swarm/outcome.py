"""A whole plan from pipelines that were worked through: its step, its limit, and words for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusionai.graph.shared_weights import waiting
from fusionai.scheduling.estimator import training_memory_bytes, update_s
from fusionai.scheduling.explain import brief_names, stage_lines
from fusionai.scheduling.plan import StagePlan, StagePrediction
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.swarm.end_of_step import end_s
from fusionai.scheduling.swarm.least import least_s
from fusionai.scheduling.swarm.running import Running
from fusionai.scheduling.swarm.work import Work
from fusionai.scheduling.swarm_plan import PipelinePlan, SwarmPlan
from fusionai.units.durations import seconds_text

_MOST_EXPLAINED = 12
"""Pipelines whose stages the explanation lists."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Pipelines together: the slowest one's seconds, and those at the end of the step."""

    runs: tuple[Running, ...]
    pipelines_s: float
    end_s: float

    @property
    def step_s(self) -> float:
        """Return the seconds of a step."""
        return self.pipelines_s + self.end_s


def outcome(work: Work, runs: Sequence[Running]) -> Outcome:
    """Return what pipelines make together."""
    slowest = max(each.times.makespan_s for each in runs)
    return Outcome(tuple(runs), slowest, end_s(work, [each.chain for each in runs]))


def owner_need_bytes(work: Work, runs: Sequence[Running]) -> float:
    """Return what the owner's machine must offer for its stages of all pipelines, with the margin of estimates.

    Weights are there once; activations are those in flight of every pipeline.
    """
    task, costs = work.task, work.segments.outer
    if task.owner is None or not costs:
        return 0.0
    stages = [0] * work.before + [-1] * work.segments.outer_after
    need = 0.0
    most_held = 0
    for cost, stage in zip(costs, stages, strict=True):
        held = sum(each.in_flight[stage] for each in runs)
        most_held = max(most_held, held)
        whole = training_memory_bytes(cost, task.owner.device, held, task.optimizer_states)
        need += whole - cost.transient_bytes
    need -= (2 + task.optimizer_states) * work.both_ends_bytes
    need += waiting(most_held * work.both_ends_bytes)
    return (need + max(cost.transient_bytes for cost in costs)) * MEMORY_MARGIN


def swarm_plan(work: Work, found: Outcome) -> SwarmPlan:
    """Return the plan with its explanation."""
    task = work.task
    pipelines = tuple(
        PipelinePlan(_stages(work, each), each.microbatches, each.times.makespan_s) for each in found.runs
    )
    used = {stage.peer for pipeline in pipelines for stage in pipeline.stages}
    left_out = [each for each in task.members if each.peer not in used]
    bottleneck = _bottleneck(work, found)
    return SwarmPlan(
        graph_hash=task.graph_hash,
        sizes=task.sizes,
        microbatches=task.microbatches,
        privacy=task.privacy,
        owner=task.owner.peer if task.owner else "",
        pipelines=pipelines,
        sync_s=found.end_s,
        predicted_step_s=found.step_s,
        bound_step_s=least_s(work),
        bottleneck=bottleneck,
        left_out=tuple(each.peer for each in left_out),
        explanation=_explanation(work, found, pipelines, [each.name for each in left_out], bottleneck),
    )


def _stages(work: Work, run: Running) -> tuple[StagePlan, ...]:
    task, updates_s = work.task, _updates_s(work, run)
    return tuple(
        StagePlan(
            stage=stage,
            peer=task.machines[machine].peer,
            start=run.nodes[stage],
            stop=run.nodes[stage + 1],
            in_flight=run.in_flight[stage],
            predicted=StagePrediction(
                forward_s=run.seconds[stage][0],
                backward_s=run.seconds[stage][1],
                update_s=updates_s[stage],
                memory_bytes=training_memory_bytes(
                    run.costs[stage], task.machines[machine].device, run.in_flight[stage], task.optimizer_states
                ),
                send_s=run.send_s[stage],
            ),
        )
        for stage, machine in enumerate(run.machines)
    )


def _updates_s(work: Work, run: Running) -> list[float]:
    """Return, by stage, the seconds of the update; what both of the owner's stages hold is updated in the first."""
    trained = [cost.trainable_bytes for cost in run.costs]
    trained[-1] -= work.both_ends_bytes
    devices = [work.task.machines[machine].device for machine in run.machines]
    return [
        update_s(nbytes, device, work.task.optimizer_states) for nbytes, device in zip(trained, devices, strict=True)
    ]


def _bottleneck(work: Work, found: Outcome) -> str:
    """Name what is busy most of a step: a machine or link of the last pipeline, or the end of the step."""
    names = [each.name for each in work.task.machines]
    last = max(found.runs, key=lambda each: each.times.makespan_s)
    computing_s = dict(last.times.busy_s)
    for index, seconds in zip(last.machines, _updates_s(work, last), strict=True):
        computing_s[str(index)] += seconds
    machine, busy_s = max(computing_s.items(), key=lambda item: item[1])
    words = f"computing on {names[int(machine)]}"
    if last.times.link_busy_s:
        (source, target), link_s = max(last.times.link_busy_s.items(), key=lambda item: item[1])
        if link_s > busy_s:
            words, busy_s = f"the link from {names[int(source)]} to {names[int(target)]}", link_s
    if last.times.line_busy_s:
        (machine, direction), line_s = max(last.times.line_busy_s.items(), key=lambda item: item[1])
        if line_s > busy_s:
            words, busy_s = f"the {direction}link of {names[int(machine)]}", line_s
    if found.end_s > busy_s:
        pipelines = len(found.runs)
        words = f"summing gradients over {pipelines} pipelines" if pipelines > 1 else "reporting and updating"
        busy_s = found.end_s
    return f"{words} (busy {busy_s / found.step_s:.0%} of it)"


def _explanation(
    work: Work, found: Outcome, pipelines: Sequence[PipelinePlan], left_out: Sequence[str], bottleneck: str
) -> tuple[str, ...]:
    task = work.task
    names = {each.peer: each.name for each in task.machines}
    offers = {each.peer: each.device.memory_bytes for each in task.machines}
    lines: list[str] = []
    for index, (pipeline, run) in enumerate(zip(pipelines, found.runs, strict=True)):
        if index == _MOST_EXPLAINED:
            lines.append(f"and {len(pipelines) - index} pipelines more")
            break
        busy = {task.machines[int(machine)].peer: s / found.step_s for machine, s in run.times.busy_s.items()}
        lines.append(f"pipeline {index}: {run.microbatches} microbatches in {seconds_text(pipeline.predicted_s)}")
        lines += stage_lines(pipeline.stages, task.graph.nodes, names, offers, busy)
    lines.append(
        f"a step takes about {seconds_text(found.step_s)}, {seconds_text(found.end_s)} of it after the last backward; "
        f"{bottleneck} limits it"
    )
    if left_out:
        lines.append(f"left out: {brief_names(left_out)} (with them a step would not be shorter)")
    return tuple(lines)
