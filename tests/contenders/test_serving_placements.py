"""Other systems' placements for serving make valid plans, none better than the planner's."""

from __future__ import annotations

import pytest
from serving_pools import check, machine, task_of

from contenders.serving.other_placements import PLACEMENTS, baseline_plan
from fusionai.errors import PlacementError
from fusionai.scheduling.serving.serving_planner import plan_serving


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_baselines_are_plans_and_not_better(name: str) -> None:
    members = tuple(machine(f"m{k}", memory=(3.3e8, 5e8, 8e8)[k % 3], bandwidth=(1 + k % 3) * 5e10) for k in range(6))
    task = task_of(*members, blocks=6)
    plan = baseline_plan(task, name)
    check(task, plan)
    assert plan.planner == name
    assert plan.predicted_tokens_per_s <= plan_serving(task).predicted_tokens_per_s * (1 + 1e-9)


def test_a_baseline_that_leaves_a_hole_says_so() -> None:
    with pytest.raises(PlacementError, match="the placement that equal_layers makes for small"):
        baseline_plan(task_of(machine("a", memory=8e8), machine("b", memory=1.5e8), blocks=6), "equal_layers")
