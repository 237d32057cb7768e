"""Plans of many pipelines: constraints are met, nothing better exists in small pools, and links decide the form."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decoder_graph import GB, SIZES, decoder, member
from every_plan_of_pipelines import best_single_step_s, best_step_of_several_s
from planning_problems import TwoCities, check, small_task, task_of

from fusionai.errors import PlacementError
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import cut
from fusionai.scheduling.planner import plan
from fusionai.scheduling.search.chain import Chain
from fusionai.scheduling.search.clusters import clustered
from fusionai.scheduling.search.end_estimate import estimated_sum_s, holders
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.shares import shared_out
from fusionai.scheduling.search.small_pools import best_small_chains
from fusionai.scheduling.segments import MEMORY_MARGIN


@pytest.mark.parametrize("seed", range(30))
def test_no_single_pipeline_is_faster_in_small_pools(seed: int) -> None:
    task = small_task(seed)
    work = costs_in_segments(task)
    best = best_single_step_s(work)
    made = plan(task)
    check(task, made)
    assert made.predicted_step_s <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(30, 45))
def test_no_plan_of_several_pipelines_is_faster_in_small_pools(seed: int) -> None:
    task = small_task(seed)
    made = plan(task)
    assert best_step_of_several_s(costs_in_segments(task), made.predicted_step_s * (1 - 1e-9)) == np.inf


def test_several_pipelines_are_gone_through() -> None:
    # Fast links and many microbatches: two machines by themselves are the fastest plan of a small model.
    task = task_of(decoder(1), [member("a"), member("b")], bytes_per_s=1e10, microbatches=8)
    work, made = costs_in_segments(task), plan(task)
    assert len(made.pipelines) == 2
    assert best_step_of_several_s(work, np.inf) == pytest.approx(made.predicted_step_s)
    assert best_single_step_s(work) > made.predicted_step_s


@pytest.mark.parametrize("seed", range(8))
def test_one_machine_alone_is_looked_at_in_any_case(seed: int) -> None:
    """Links that look fast but share slow lines: pipelines of several are ideally faster, and really slower."""
    draw, graph = random.Random(seed), decoder(2)
    whole = int(stage_cost(cut(graph, [])[0], SIZES).training_bytes(2, 2) * MEMORY_MARGIN)
    members = [member(f"m{k}", gflops=draw.uniform(150, 200), memory_bytes=int(0.8 * whole)) for k in range(23)]
    slow = member("slow", gflops=draw.uniform(50, 80), memory_bytes=2 * whole)
    lines = np.full(24, 1e5), np.full(24, 1e5)
    made = plan(replace(task_of(graph, [*members, slow], microbatches=2), lines=lines))
    assert made.predicted_step_s <= plan(task_of(graph, [slow], microbatches=2)).predicted_step_s * (1 + 1e-9)


def test_a_machine_alone_is_chosen_with_its_report_to_the_owner() -> None:
    """The faster one of two that hold the model is far from the owner, who hears of every step."""
    graph = decoder(2)
    whole = int(stage_cost(cut(graph, [])[0], SIZES).training_bytes(2, 2) * MEMORY_MARGIN)
    members = [member(f"m{k}", gflops=180.0, memory_bytes=int(0.8 * whole)) for k in range(10)]
    members += [member(name, gflops=gflops, memory_bytes=2 * whole) for name, gflops in (("far", 100), ("near", 90))]

    class FarFromOwner(TwoCities):
        def rtts_s(self, sources: Any, targets: Any) -> Any:
            one, other = np.broadcast_arrays(sources, targets)
            return np.where((np.minimum(one, other) == 10) & (np.maximum(one, other) == 12), 5.0, 1e-4)

    task = task_of(graph, members, links=FarFromOwner(26, 1e9, 1e9), microbatches=4, owner=member("owner"))
    made = plan(replace(task, lines=(np.full(13, 1e5), np.full(13, 1e5))))
    assert [[stage.peer for stage in each.stages] for each in made.pipelines] == [["p-near"]]


def test_large_pools_are_not_enumerated() -> None:
    task = task_of(decoder(1), [member(f"m{k}") for k in range(1100)], links=TwoCities(1100))
    assert best_small_chains(costs_in_segments(task), 1.0) == []


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_plans_are_valid(seed: int, private: bool) -> None:
    draw = random.Random(seed)
    members = [
        member(
            f"m{k}", gflops=draw.uniform(20, 200), dialable=draw.random() < 0.7, memory_bytes=draw.choice((GB, 10 * GB))
        )
        for k in range(draw.randint(5, 14))
    ]
    task = task_of(decoder(8), members, private=private, microbatches=24, bytes_per_s=10 ** draw.uniform(6, 9))
    check(task, plan(task))


def test_more_machines_are_never_slower() -> None:
    graph = decoder(8)
    machines = [member(f"m{k}", gflops=50 + 40 * (k % 4)) for k in range(12)]
    for rate in (1e7, 1e9):
        steps = [
            plan(task_of(graph, machines[:count], bytes_per_s=rate)).predicted_step_s for count in (1, 2, 3, 6, 12)
        ]
        for fewer, more in itertools.pairwise(steps):
            assert more <= fewer * (1 + 1e-9)


def test_a_slow_machine_is_left_out() -> None:
    made = plan(task_of(decoder(8), [*(member(f"m{k}") for k in range(4)), member("snail", gflops=0.01)]))
    assert "p-snail" in made.left_out


def test_the_slow_bridge_is_crossed_at_most_once() -> None:
    # The model does not fit one machine, nor one city.
    graph = decoder(12, hidden=128)
    members = [member(f"m{k}", memory_bytes=10_000_000) for k in range(8)]
    task = task_of(graph, members, links=TwoCities(8))
    made = plan(task)
    check(task, made)
    side = {each.peer: index < 4 for index, each in enumerate(members)}
    for pipeline in made.pipelines:
        sides = [side[stage.peer] for stage in pipeline.stages]
        assert sum(one != other for one, other in itertools.pairwise(sides)) <= 1


def test_links_decide_between_one_pipeline_and_several() -> None:
    graph, members = decoder(8, hidden=128), [member(f"m{k}") for k in range(4)]
    assert len(plan(task_of(graph, members, bytes_per_s=1e10, microbatches=64)).pipelines) == 4
    assert len(plan(task_of(graph, members, bytes_per_s=1e6, microbatches=8)).pipelines) == 1


def test_a_ring_takes_what_the_formula_says() -> None:
    task = task_of(decoder(3), [member(name) for name in "abc"], rtt_s=0.02, bytes_per_s=1e6)
    work = costs_in_segments(task)
    alone = [Chain((machine,), (0, work.count), 0.0, 0.0, 1) for machine in range(3)]
    weights = work.counted_bytes.sum()
    assert estimated_sum_s(work, holders(work, alone)) == pytest.approx(4 / 3 * weights / 1e6 + 4 * 0.01)
    assert estimated_sum_s(work, holders(work, alone[:1])) == 0


@pytest.mark.parametrize("seed", range(10))
def test_shares_are_the_best_ones(seed: int) -> None:
    draw = np.random.default_rng(seed)
    latency, period = draw.uniform(1, 9, 3), draw.uniform(0.5, 3, 3)

    def last_s(shares: Sequence[int]) -> float:
        return max((latency[k] + (share - 1) * period[k] for k, share in enumerate(shares) if share), default=0.0)

    found = shared_out(latency, period, 7)
    assert found.sum() == 7
    ways = (each for each in itertools.product(range(8), repeat=3) if sum(each) == 7)
    assert last_s(found.tolist()) == pytest.approx(min(last_s(each) for each in ways))


@pytest.mark.parametrize("count", [10, 400])
def test_clusters_are_the_cities(count: int) -> None:
    task = task_of(decoder(1), [member(f"m{k}") for k in range(count)], links=TwoCities(count))
    found = {frozenset(each.tolist()) for each in clustered(task, task.candidates)}
    assert found == {frozenset(range(count // 2)), frozenset(range(count // 2, count))}


class TestErrors:
    def test_no_machines(self) -> None:
        with pytest.raises(PlacementError, match="fusionai join"):
            plan(task_of(decoder(2), []))

    def test_too_little_memory(self) -> None:
        says = r"2 compnodes .* offer 24 MB: .* are missing; add compnodes \(\d+ like a could hold it\), raise"
        with pytest.raises(PlacementError, match=says):
            plan(task_of(decoder(4, hidden=256), [member(name, memory_bytes=12 * 10**6) for name in "ab"]))

    def test_a_part_that_fits_nobody(self) -> None:
        with pytest.raises(PlacementError, match=r"largest part needs .* the best compnode, a, offers 1 MB"):
            plan(task_of(decoder(4, hidden=256), [member(name, memory_bytes=10**6) for name in "ab"]))

    def test_nobody_can_be_linked_with_the_owner(self) -> None:
        owner = member("owner", dialable=False)
        with pytest.raises(PlacementError, match="--listen"):
            plan(task_of(decoder(2), [member("a", dialable=False)], private=True, owner=owner))

    def test_the_owner_holds_too_little(self) -> None:
        owner = member("owner", memory_bytes=1000)
        with pytest.raises(PlacementError, match="owner's own stages"):
            plan(task_of(decoder(2), [member("a")], private=True, owner=owner))
