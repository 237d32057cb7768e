"""Placement for serving against trying everything, networkx, and hand-worked cases."""

from __future__ import annotations

import itertools
import math
import random

import msgspec
import networkx as nx
import numpy as np
import pytest
from serving_pools import (
    LOAD,
    check,
    gaps,
    latency_is_optimal,
    least_token_s,
    links_of_pool,
    machine,
    random_task,
    task_of,
)

from fusionai.errors import PlacementError
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.profile import LinkProfile, Pool
from fusionai.scheduling.serving.cover import Filler, fill
from fusionai.scheduling.serving.flow import SINK, SOURCE, Arc, most_flow
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_planner import plan_of_placement, plan_serving


@pytest.mark.parametrize("block", range(6))
def test_the_route_of_a_stream_is_the_fastest_of_all(block: int) -> None:
    assert all(latency_is_optimal(seed) for seed in range(10 * block, 10 * block + 10))


def test_small_pools_get_the_best_placement_for_throughput() -> None:
    found = gaps((3, 7, 40))
    assert len(found) == 3
    assert all(abs(planned) < 1e-9 for _, planned in found)
    # The search that larger pools get is not exact, and this would notice if it became much worse.
    assert all(searched < 0.35 for searched, _ in found)


@pytest.mark.parametrize("seed", range(0, 60, 12))
def test_plans_of_random_pools_keep_the_rules(seed: int) -> None:
    for objective in ("throughput", "latency"):
        task = random_task(seed, objective=objective)
        if math.isfinite(least_token_s(task)):
            check(task, plan_serving(task))


# --- flows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_flows_are_as_large_as_networkx_finds(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    capacities = [draw.uniform(1, 10) for _ in range(count)]
    arcs = [Arc(SOURCE, k, draw.uniform(1, 8), draw.random()) for k in range(count) if draw.random() < 0.6]
    arcs += [Arc(k, SINK, draw.uniform(1, 8), draw.random()) for k in range(count) if draw.random() < 0.6]
    arcs += [
        Arc(k, j, draw.uniform(0.5, 5), draw.random())
        for k, j in itertools.combinations(range(count), 2)
        if draw.random() < 0.5
    ]
    graph = nx.DiGraph()
    graph.add_nodes_from(["from", "to"])
    for k in range(count):
        graph.add_edge((k, 0), (k, 1), capacity=capacities[k])
    for arc in arcs:
        tail = "from" if arc.tail == SOURCE else (arc.tail, 1)
        graph.add_edge(tail, "to" if arc.head == SINK else (arc.head, 0), capacity=arc.capacity)
    flows = most_flow(capacities, [draw.random() for _ in range(count)], arcs)
    total = sum(flow for arc, flow in zip(arcs, flows, strict=True) if arc.head == SINK)
    assert total == pytest.approx(nx.maximum_flow_value(graph, "from", "to"), abs=1e-6)
    assert all(-1e-9 <= flow <= arc.capacity + 1e-9 for arc, flow in zip(arcs, flows, strict=True))


def test_the_quick_route_is_filled_first() -> None:
    arcs = [Arc(SOURCE, 0, 9.0, 1.0), Arc(SOURCE, 1, 9.0, 0.1), Arc(0, SINK, 9.0, 1.0), Arc(1, SINK, 2.0, 0.1)]
    assert most_flow([3.0, 9.0], [0.0, 0.0], arcs) == [3.0, 2.0, 3.0, 2.0]


def test_covering_fills_what_is_missing() -> None:
    # Two machines that each hold two of four segments at rate 5, and one that holds any single one at 5.
    rate = np.zeros((5, 5))
    for start in range(4):
        rate[start, start + 1] = 5.0
        if start < 3:
            rate[start, start + 2] = 5.0
    ranges, share = fill([Filler.of(rate)] * 2, [(0, 4)] * 2, 5.0, 4)
    assert share == 1.0
    assert sorted(ranges) == [(0, 2), (2, 4)]


# --- by hand --------------------------------------------------------------------------------------------------------


def test_one_machine_that_holds_all_gives_the_rate_of_its_passes() -> None:
    task = task_of(machine("a", memory=1e9))
    plan = plan_serving(task)
    check(task, plan)
    (shard,) = plan.shards
    assert (shard.first, shard.last) == (0, 5)
    times = Evaluator(task).times.at(0, 0, 5)
    assert plan.predicted_tokens_per_s == pytest.approx(float(times.tokens_per_s(np.asarray(0.0))), rel=1e-3)


def test_equal_machines_without_room_for_all_make_equal_halves_or_better() -> None:
    members = tuple(machine(f"m{k}", memory=3.2e8) for k in range(4))
    task = task_of(*members, blocks=4)
    plan = plan_serving(task)
    check(task, plan)
    halves = [HeldRange(3, 0, 0), HeldRange(6, 3, 1), HeldRange(3, 0, 2), HeldRange(6, 3, 3)]
    by_hand = plan_of_placement(Evaluator(task), halves, "by hand")
    assert plan.predicted_tokens_per_s >= by_hand.predicted_tokens_per_s * (1 - 1e-9)


def test_a_slow_machine_is_left_out_of_a_stream_but_used_for_throughput() -> None:
    fast, slow = machine("fast"), machine("slow", bandwidth=1e10)
    latency = plan_serving(task_of(fast, slow, objective="latency"))
    assert latency.left_out == ("slow",)
    assert latency.predicted_token_s == latency.bound_token_s
    throughput = plan_serving(task_of(fast, slow))
    assert throughput.left_out == ()
    assert throughput.predicted_tokens_per_s > latency.predicted_tokens_per_s


def test_a_far_machine_serves_no_stream_that_a_near_one_can() -> None:
    near, far = machine("near", bandwidth=5e10), machine("far")
    members = (near, far)
    pairs = {
        f"{one}>{other}": LinkProfile(0.2 if "far" in (one, other) else 1e-3, 1e9)
        for one, other in itertools.permutations(("near", "far", "owner"), 2)
    }
    links = PoolLinks(Pool(members, pairs), ["near", "far", "owner"])
    plan = plan_serving(task_of(*members, links=links, owner=machine("owner"), objective="latency"))
    assert [shard.peer for shard in plan.shards] == ["near"]


def test_private_serving_keeps_the_ends_with_the_owner() -> None:
    owner = machine("owner", bandwidth=2e10)
    for objective in ("throughput", "latency"):
        task = task_of(machine("a"), machine("b"), owner=owner, private=True, objective=objective)
        plan = plan_serving(task)
        check(task, plan)
        assert plan.private
        assert min(shard.first for shard in plan.shards) == 1
        assert max(shard.last for shard in plan.shards) == 4
        assert plan.owner == "owner"
    open_plan = plan_serving(task_of(machine("a"), machine("b"), owner=owner))
    assert min(shard.first for shard in open_plan.shards) == 0


def test_hidden_machines_are_never_neighbours() -> None:
    members = (
        machine("a", memory=2.7e8, dialable=False),
        machine("b", memory=2.7e8, dialable=False),
        machine("c", memory=2.7e8),
    )
    task = task_of(*members, blocks=4)
    plan = plan_serving(task)
    check(task, plan)
    assert {shard.peer for shard in plan.shards} == {"a", "b", "c"}


def test_a_narrow_link_limits_the_flow_and_is_named() -> None:
    members = (machine("a", memory=3e8), machine("b", memory=3e8))
    owner = machine("owner")
    task = task_of(*members, links=links_of_pool(members, True, rate=1e6), owner=owner, blocks=3)
    plan = plan_serving(task)
    check(task, plan)
    carried = LOAD.carried_tokens * 2048
    between = [flow for flow in plan.flows if "owner" not in (flow.source, flow.target)]
    assert between
    assert all(flow.capacity_tokens_per_s == pytest.approx(1e6 / carried) for flow in between)
    assert "link" in plan.bottleneck


def test_plans_are_the_same_each_time_and_start_from_a_former_one() -> None:
    members = tuple(machine(f"m{k}", memory=2.5e8, bandwidth=(1 + k % 3) * 5e10) for k in range(5))
    task = task_of(*members, blocks=5)
    first, second = plan_serving(task), plan_serving(task)
    assert msgspec.structs.replace(first, planning_s=0.0) == msgspec.structs.replace(second, planning_s=0.0)
    smaller = task_of(*members[:-1], blocks=5)
    again = plan_serving(smaller, previous=first)
    check(smaller, again)
    assert all(shard.peer != "m4" for shard in again.shards)


def test_a_plan_says_who_holds_what() -> None:
    plan = plan_serving(task_of(machine("a", memory=3e8), machine("b", memory=3e8)))
    text = "\n".join(plan.explanation)
    assert "embedding, block" in text
    assert "head; " in text
    assert "what limits it: " in text
    assert "room for " in text


# --- impossible jobs ------------------------------------------------------------------------------------------------


def test_too_little_memory_says_how_much_is_missing() -> None:
    with pytest.raises(PlacementError, match=r"needs .* offer .*: .* are missing; add compnodes"):
        plan_serving(task_of(machine("a", memory=2e8), machine("b", memory=2e8), blocks=8))


def test_a_block_that_fits_nowhere_is_named() -> None:
    with pytest.raises(PlacementError, match=r"\(block 0\) needs .* the best compnode, a, offers 90 MB, .* too little"):
        plan_serving(task_of(machine("a", memory=9e7), machine("b", memory=8e7)))


def test_pools_that_cannot_be_linked_say_so() -> None:
    hidden = [machine(name, memory=3e8, dialable=False) for name in "ab"]
    with pytest.raises(PlacementError, match="neither side can be dialled"):
        plan_serving(task_of(*hidden))
    with pytest.raises(PlacementError, match="linked with the gateway's machine, owner"):
        plan_serving(task_of(*hidden, owner=machine("owner", dialable=False)))


def test_an_owner_too_small_for_its_ends_is_told() -> None:
    with pytest.raises(PlacementError, match=r"on the owner's machine, owner, which offers 10 MB, .* too little"):
        plan_serving(task_of(machine("a"), owner=machine("owner", memory=1e7), private=True))
    with pytest.raises(PlacementError, match="no owner is given"):
        task_of(machine("a"), private=True)
    with pytest.raises(PlacementError, match="no compnodes"):
        task_of()
