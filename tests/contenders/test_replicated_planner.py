"""Plans of replicated stages: valid, near the best of all in small pools, shaped by links and memory, and honest."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from decoder_graph import GB, decoder, member
from replicated_tasks import task

from contenders.replicated.equal_stages import equal_stages
from contenders.replicated.job_of_cuts import job_of_cuts
from contenders.replicated.replicated_planner import best_stages
from contenders.routers.step_estimate import step_estimate
from fusionai.errors import PlacementError
from fusionai.scheduling.planner import plan
from fusionai.scheduling.profile import LinkProfile
from fusionai.scheduling.search.segment_tables import costs_in_segments


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_are_valid(private: bool, tied: bool) -> None:
    members = [member(f"m{each}", gflops=20.0 + 30.0 * (each % 3), memory_bytes=GB) for each in range(7)]
    asked = task(members, decoder(6, tied=tied), private=private)
    work = costs_in_segments(asked)
    bounds, holders, job = best_stages(work)
    assert (bounds[0], bounds[-1]) == (0, work.count)
    assert all(one < other for one, other in itertools.pairwise(bounds))
    assert len(holders) == job.stages == len(bounds) - 1 + (2 if private else 0)
    owned = [stage for stage, group in enumerate(holders) if asked.owner_index in group]
    assert owned == ([0, job.stages - 1] if private else [])
    held = [machine for group in holders for machine in group if machine != asked.owner_index]
    assert len(set(held)) == len(held)
    assert all(job.possible(stage, machine) for stage, group in enumerate(holders) for machine in group)
    estimate = step_estimate(job, holders)
    assert estimate.step_s > estimate.sum_s + estimate.commit_s


def test_a_bottleneck_gets_more_holders() -> None:
    """With fast links and many microbatches, everybody works; the sum of gradients is nearly free."""
    members = [member(f"m{each}", gflops=1.0) for each in range(6)]
    _, holders, _ = best_stages(costs_in_segments(task(members, decoder(3), microbatches=64, bytes_per_s=1e11)))
    assert sorted(machine for group in holders for machine in group) == list(range(6))
    assert max(len(group) for group in holders) > 1


def test_holders_of_a_stage_are_near_each_other() -> None:
    """Two clusters with a slow link between: no stage has holders in both, or the sum would cross it."""
    members = [member(f"m{each}", gflops=1.0) for each in range(8)]
    links = {
        f"{one.peer}>{other.peer}": LinkProfile(1e-3, 1e10 if (place < 4) == (behind < 4) else 2e5)
        for (place, one), (behind, other) in itertools.permutations(enumerate(members), 2)
    }
    _, holders, _ = best_stages(costs_in_segments(task(members, decoder(4), microbatches=64, links=links)))
    for group in holders:
        assert len({machine < 4 for machine in group}) == 1


@pytest.mark.slow
def test_no_worse_than_the_best_single_pipeline_as_estimated() -> None:
    for seed in range(6):
        draw = random.Random(seed)
        members = [member(f"m{each}", gflops=draw.uniform(5, 100), memory_bytes=GB) for each in range(6)]
        asked = task(members, decoder(5), bytes_per_s=10 ** draw.uniform(6, 9))
        work = costs_in_segments(asked)
        whole = plan(asked)
        _, holders, job = best_stages(work)
        place = {position: index for index, position in enumerate(work.positions)}
        number = {each.peer: index for index, each in enumerate(asked.machines)}
        for pipeline in whole.pipelines:
            bounds = (0, *(place[each.stop] for each in pipeline.stages))
            alone = [[number[each.peer]] for each in pipeline.stages]
            assert step_estimate(job, holders).step_s <= step_estimate(job_of_cuts(work, bounds), alone).step_s * 1.0001


@pytest.mark.slow
def test_near_the_best_of_all_in_small_pools() -> None:
    """Every cut and every assignment of three machines to stages, by the same estimate."""
    ratios = []
    for seed in range(25):
        draw = random.Random(seed)
        members = [member(f"m{each}", gflops=draw.uniform(1, 20), memory_bytes=GB) for each in range(3)]
        links = {
            f"{one.peer}>{other.peer}": LinkProfile(10 ** draw.uniform(-4, -2), 10 ** draw.uniform(6.5, 9.5))
            for one, other in itertools.permutations(members, 2)
        }
        asked = task(members, decoder(draw.choice((1, 2)), hidden=draw.choice((32, 64))), links=links)
        work = costs_in_segments(asked)
        best = math.inf
        for stages in (1, 2, 3):
            for inner in itertools.combinations(range(1, work.count), stages - 1):
                job = job_of_cuts(work, (0, *inner, work.count))
                for places in itertools.product(range(-1, stages), repeat=3):
                    holders = [[each for each in range(3) if places[each] == stage] for stage in range(stages)]
                    if all(holders):
                        best = min(best, step_estimate(job, holders).step_s)
        _, holders, job = best_stages(work)
        ratios.append(step_estimate(job, holders).step_s / best)
    assert min(ratios) > 1 - 1e-9
    assert statistics.median(ratios) < 1.001
    assert max(ratios) < 1.25


def test_the_tables_of_a_cut() -> None:
    asked = task([member("a"), member("b", gflops=50.0)], decoder(4, tied=True))
    work = costs_in_segments(asked)
    middle = work.count // 2
    job = job_of_cuts(work, (0, middle, work.count))
    assert job.forward_bytes == (0.0, work.segments.forward_bytes_P[middle])
    assert job.forward_s[0, 1] == pytest.approx(2 * job.forward_s[0, 0], rel=0.05)
    trained = sum(group.size_bytes for group in job.weights)
    assert trained == work.counted_bytes.sum()
    assert any(group.stages == (0, 1) for group in job.weights)  # the tied embedding


def test_equal_stages_use_everybody() -> None:
    members = [member(f"m{each}", gflops=10.0 + each) for each in range(7)]
    work = costs_in_segments(task(members, decoder(4)))
    holders, job = equal_stages(work, 3)
    assert job.stages == 3
    assert sorted(len(each) for each in holders) == [2, 2, 3]


def test_too_little_memory_is_said() -> None:
    with pytest.raises(PlacementError, match="memory"):
        best_stages(
            costs_in_segments(task([member("a", memory_bytes=1000), member("b", memory_bytes=1000)], decoder(4)))
        )
    with pytest.raises(PlacementError, match="memory"):
        equal_stages(costs_in_segments(task([member("a", memory_bytes=1000)], decoder(2))), 2)
