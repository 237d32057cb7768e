"""What the planner is compared with does what it says."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from decoder_graph import decoder, member
from planning_problems import TwoCities, check, task_of

from contenders.planners.genetic_order import genetic_order
from contenders.planners.grid_search import _matched, _Search, best_grid, grid_search
from contenders.planners.one_chain import chain_outcome
from contenders.planners.proportional_splits import (
    RULES,
    cheapest_prefix,
    cut_again,
    equal_compute,
    equal_layers,
    memory_proportional,
)
from fusionai.errors import PlacementError
from fusionai.scheduling.planner import plan
from fusionai.scheduling.search.segment_tables import costs_in_segments


def test_cutting_again_changes_cuts_alone() -> None:
    members = [member(f"m{k}", gflops=40 + 80 * (k % 2)) for k in range(6)]
    task = task_of(decoder(8, hidden=128), members, bytes_per_s=1e7)
    made, work = plan(task), costs_in_segments(task)
    number = {each.peer: index for index, each in enumerate(task.members)}
    for rule in RULES.values():
        again = cut_again(work, made, rule)
        assert again is not None
        for pipeline, other in zip(made.pipelines, again.pipelines, strict=True):
            assert other.choice.machines == tuple(number[stage.peer] for stage in pipeline.stages)
            assert other.choice.microbatches == pipeline.microbatches
        # The planner solves cuts up to 0.2 %.
        assert again.step_s >= 0.998 * made.predicted_step_s


@pytest.mark.parametrize("rule", RULES)
def test_the_best_number_of_machines_is_no_worse_than_any(rule: str) -> None:
    members = [member(f"m{k}", gflops=20.0 * (k + 1)) for k in range(6)]
    task = task_of(decoder(8), members, links=TwoCities(6), microbatches=24)
    work = costs_in_segments(task)
    best = cheapest_prefix(work, RULES[rule])
    assert best is not None
    for scope in (np.arange(6), np.arange(3), np.arange(3, 6)):
        fastest = scope[::-1]
        for count in range(1, len(scope) + 1):
            tried = chain_outcome(work, fastest[:count], RULES[rule](work, fastest[:count]))
            assert tried is None or best.step_s <= tried.step_s * 1.01


@pytest.mark.parametrize("seed", range(20))
def test_the_slowest_pair_of_a_matching_is_as_fast_as_can_be(seed: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 9, (5, 5)).astype(float)
    match = _matched(cost)
    assert sorted(match) == list(range(5))
    least = min(max(cost[row, column] for row, column in enumerate(way)) for way in itertools.permutations(range(5)))
    assert max(cost[row, column] for row, column in enumerate(match)) == least


def test_a_grid_takes_all_machines_in_equal_pipelines() -> None:
    members = [member(f"m{k}", gflops=40 + 80 * (k % 2)) for k in range(8)]
    task = task_of(decoder(5, hidden=128), members, links=TwoCities(8), microbatches=24)
    made = grid_search(task)
    check(task, made)
    assert not made.left_out
    assert len({len(pipeline.stages) for pipeline in made.pipelines}) == 1
    assert {pipeline.microbatches for pipeline in made.pipelines} == {24 // len(made.pipelines)}
    assert plan(task).predicted_step_s <= made.predicted_step_s


def test_the_search_puts_groups_that_sum_much_within_a_city() -> None:
    # Cities take turns in the given order; two groups of three with heavy weights belong in one city each.
    class Turns(TwoCities):
        def _near(self, sources: object, targets: object) -> object:
            return np.asarray(sources) % 2 == np.asarray(targets) % 2

    members = [member(f"m{k}") for k in range(6)]
    task = task_of(decoder(8, hidden=256), members, links=Turns(6, far_bytes_per_s=1e6), microbatches=3)
    rows = _Search(costs_in_segments(task), 2).best_rows()
    groups = [{row[stage] % 2 for row in rows} for stage in (0, 1)]
    assert sorted(map(len, groups)) == [1, 1]


def test_a_grid_that_fits_nowhere_says_so() -> None:
    members = [member(name, memory_bytes=3 * 10**6) for name in "ab"]
    task = task_of(decoder(8, hidden=256), members)
    assert best_grid(costs_in_segments(task)) is None
    with pytest.raises(PlacementError, match="no grid of equal stages"):
        grid_search(task)


@pytest.mark.parametrize("baseline", [equal_layers, equal_compute, memory_proportional, genetic_order])
def test_baselines_make_valid_plans_that_are_not_faster(baseline: Any) -> None:
    members = [member(f"m{k}", gflops=40 + 80 * (k % 2)) for k in range(6)]
    task = task_of(decoder(8), members, links=TwoCities(6))
    made = baseline(task)
    check(task, made)
    assert len(made.pipelines) == 1
    assert plan(task).predicted_step_s <= made.predicted_step_s
