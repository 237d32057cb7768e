"""From a graph, machines and cuts to the tables that routing and its simulator work on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contenders.routers.routed_job import DRIVER, RoutedJob, SharedWeights, StageMemory
from fusionai.graph.cost import StageCost
from fusionai.scheduling.estimator import backward_s, deferred_s, forward_s, training_memory_bytes, update_s
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import DeviceProfile
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.segments import MEMORY_MARGIN


def stage_costs(work: SegmentCosts, bounds: Sequence[int]) -> tuple[StageCost, ...]:
    """Return the costs of all stages, the owner's among them; `bounds` are indices of `work.positions`."""
    problem, ends = work.problem, [work.positions[bound] for bound in bounds]
    cuts = [end for end in ends if 0 < end < len(problem.graph.nodes)]
    return problem.costs.cut(problem.graph, problem.sizes, cuts).costs


def job_of_cuts(work: SegmentCosts, bounds: Sequence[int]) -> RoutedJob:
    """Return what stages cut at `bounds` (indices of `work.positions`, both ends among them) take on every machine.

    Machines are numbered as in the problem's `machines`. The owner's stages come first and last, and nobody else may
    hold them.
    A value that several later stages read is taken to be handed on from stage to stage.
    """
    task = work.problem
    costs = stage_costs(work, bounds)
    stages, machines = len(costs), len(task.machines)
    pinned = frozenset(range(work.before)) | frozenset(range(stages - work.segments.outer_after, stages))
    shape = stages, machines
    forward, backward = np.full(shape, np.inf), np.full(shape, np.inf)
    deferred, update, in_flight = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64)
    fixed = np.zeros(shape)
    trained = [cost.trainable_bytes for cost in costs]
    ends_of_graph = {0, len(work.all_costs) - 1}
    if len(work.segments.outer) > 1:
        # What both of the owner's stages hold is updated once.
        trained[-1] -= sum(size for size, parts in work.tied if ends_of_graph <= set(parts))
    known: dict[tuple[object, ...], tuple[float, float, float, float]] = {}
    for stage, cost in enumerate(costs):
        for machine, member in enumerate(task.machines):
            if (machine == task.owner_index) != (stage in pinned):
                continue
            device = member.device
            rates = device.memory_bytes_per_s, device.update_bytes_per_s, device.overhead_s, device.device
            key = stage, *sorted(device.flops_per_s.items()), *rates
            if key not in known:
                known[key] = _seconds(cost, trained[stage], device, task)
            fixed[stage, machine] = training_memory_bytes(cost, device, 0, task.optimizer_states)
            room = _room(cost, device, task)
            if room >= 1:
                in_flight[stage, machine] = room
                forward[stage, machine], backward[stage, machine], deferred[stage, machine], update[stage, machine] = (
                    known[key]
                )
    ends = list(bounds) if task.pinned else list(bounds)[1:-1]
    places = _entered(work, ends)
    everyone = np.arange(machines)
    return RoutedJob(
        peers=tuple(member.peer for member in task.machines),
        microbatches=task.microbatches,
        forward_s=forward,
        backward_s=backward,
        deferred_s=deferred,
        update_s=update,
        in_flight=in_flight,
        forward_bytes=(0.0, *(float(work.segments.forward_bytes_P[place]) for place in places)),
        gradient_bytes=(0.0, *(float(work.segments.gradient_bytes_P[place]) for place in places)),
        state_bytes=tuple(float((1 + task.optimizer_states) * c.trainable_bytes + c.other_bytes) for c in costs),
        weights=_shared(work, bounds),
        bandwidth=task.bandwidths(everyone[:, None], everyone[None]),
        delay_s=task.delays(everyone[:, None], everyone[None]),
        driver=task.owner_index if task.owner_index is not None and task.pinned else DRIVER,
        pinned=pinned,
        memory=StageMemory(
            fixed_bytes=fixed,
            held_bytes=np.asarray([float(cost.saved_bytes) for cost in costs]),
            offered_bytes=np.asarray([member.device.memory_bytes / MEMORY_MARGIN for member in task.machines]),
        ),
    )


def _entered(work: SegmentCosts, ends: Sequence[int]) -> list[int]:
    """Return the positions (indices) at which stages but the first are entered."""
    if not work.problem.pinned:
        return list(ends)
    first = 0 if work.before else 1
    last = len(ends) if work.segments.outer_after else len(ends) - 1
    return list(ends[first:last])


def _seconds(
    cost: StageCost, trained_bytes: int, device: DeviceProfile, task: TrainingProblem
) -> tuple[float, float, float, float]:
    whole_s = backward_s(cost, device, task.precision)
    return (
        forward_s(cost, device, task.precision),
        whole_s,
        min(whole_s, deferred_s(cost, device, task.precision)),
        update_s(trained_bytes, device, task.optimizer_states),
    )


def _room(cost: StageCost, device: DeviceProfile, task: TrainingProblem) -> int:
    """Return how many microbatches fit between forward and backward, the margin of estimates kept."""
    fixed = training_memory_bytes(cost, device, 0, task.optimizer_states)
    spare = device.memory_bytes / MEMORY_MARGIN - fixed
    if spare < cost.saved_bytes:
        return 0
    return min(task.microbatches, int(spare / cost.saved_bytes)) if cost.saved_bytes else task.microbatches


def _shared(work: SegmentCosts, bounds: Sequence[int]) -> tuple[SharedWeights, ...]:
    """Return the weights by the stages that use them."""
    last = len(work.segments.costs)
    stage_of = np.searchsorted(np.asarray(bounds), np.arange(last), side="right") - 1 + work.before
    after = len(bounds) - 1 + work.before
    by_stages: dict[tuple[int, ...], int] = {}
    single = [(int(size), (part,)) for part, size in enumerate(work.single_bytes) if size]
    for size, parts in (*single, *work.tied):
        stages = {
            0 if part < work.before else after if part - work.before >= last else int(stage_of[part - work.before])
            for part in parts
        }
        key = tuple(sorted(stages))
        by_stages[key] = by_stages.get(key, 0) + size
    return tuple(SharedWeights(stages, float(size)) for stages, size in sorted(by_stages.items()))
