"""Placements that other systems make, to compare with: same task, same evaluation.

What such a system decides is the ranges. Requests are routed over them by the same max-flow as ours, which is more than
their own routing would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

from fusionai.scheduling.serving.placements import (
    block_tokens_per_s,
    equal_borders,
    most_segments,
    petals_like,
    separate_pipelines,
)
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_plan import ServingPlan
from fusionai.scheduling.serving.serving_planner import plan_of_placement
from fusionai.scheduling.serving.serving_task import ServingTask


def swarm_like(evaluator: Evaluator) -> list[HeldRange]:
    """Return the placement in equal stages, each machine in the stage that has least throughput.

    SWARM (Ryabinin et al., arXiv 2301.11913), as Helix's evaluation uses it: as few stages as the machine with least
    memory allows, machines spread over them so that the stages' throughputs are alike.
    """
    task = evaluator.task
    counts = [most_segments(evaluator, machine) for machine in range(len(task.members))]
    usable = [machine for machine, count in enumerate(counts) if count]
    blocks = task.back - task.front
    stages = math.ceil(blocks / min((counts[machine] for machine in usable), default=1))
    stages = min(stages, task.model.blocks)
    borders = equal_borders(task, stages)
    speed = [0.0] * stages
    shares = []
    for machine in sorted(usable, key=lambda k: (-block_tokens_per_s(evaluator, k), k)):
        stage = min(range(stages), key=lambda k: (speed[k], k))
        speed[stage] += block_tokens_per_s(evaluator, machine)
        shares.append(HeldRange(borders[stage + 1], borders[stage], machine))
    return shares


def equal_layers(evaluator: Evaluator) -> list[HeldRange]:
    """Return one pipeline over all machines in the given order, with equal numbers of layers."""
    task = evaluator.task
    borders = equal_borders(task, min(len(task.members), task.model.blocks))
    return [HeldRange(stop, start, machine) for machine, (start, stop) in enumerate(pairwise(borders))]


PLACEMENTS: Mapping[str, Callable[[Evaluator], list[HeldRange]]] = {
    "petals": petals_like,
    "swarm": swarm_like,
    "separate": separate_pipelines,
    "equal_layers": equal_layers,
}


def baseline_plan(task: ServingTask, name: str) -> ServingPlan:
    """Return the plan of one of `PLACEMENTS`.

    Raises PlacementError when the baseline leaves parts of the model to nobody, or gives somebody too much.
    """
    evaluator = Evaluator(task)
    return plan_of_placement(evaluator, PLACEMENTS[name](evaluator), name)
