"""Placements that other systems make, to compare with: same task, same evaluation.

What such a system decides is the ranges. Requests are routed over them by the same max-flow as ours, which is more than
their own routing would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusionai.scheduling.serving.placements import equal_layers, petals_like, separate_pipelines, swarm_like
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_plan import ServingPlan
from fusionai.scheduling.serving.serving_planner import plan_of_placement
from fusionai.scheduling.serving.serving_task import ServingTask

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
