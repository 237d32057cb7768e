"""Simulated serving against hand-worked cases, and against what max-flow allows."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from serving_pools import HIDDEN_BYTES, least_token_s, machine, random_task, small_model, stage_s

from contenders.serving.helix_clusters import CLUSTERS, GEO_DISTRIBUTED
from contenders.serving.request_router import Router
from contenders.serving.requests import Lengths, Request, offline, poisson
from contenders.serving.serving_report import spread_of
from contenders.serving.serving_simulator import simulate_serving
from contenders.serving.wires import Wire
from fusionai.errors import ConfigError
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.scheduling.serving.load import load_of
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_plan import FlowPlan, ServingPlan
from fusionai.scheduling.serving.serving_planner import plan_of_placement, plan_serving
from fusionai.scheduling.serving.serving_task import ServingTask

RATE, DELAY_S = 1e6, 0.01


def task_of(
    *members: Member, blocks: int = 2, lengths: tuple[int, int] = (100, 4), owner: Member | None = None, **more: Any
) -> ServingTask:
    peers = [*(each.peer for each in members), *([] if owner is None else [owner.peer])]
    pairs = {f"{a}>{b}": LinkProfile(2 * DELAY_S, RATE) for a, b in itertools.permutations(peers, 2)}
    links = PoolLinks(Pool(members, pairs), peers)
    return ServingTask(
        model=small_model(blocks),
        members=members,
        links=links,
        load=load_of([lengths]),
        owner=owner,
        precision="fp32",
        **more,
    )


def placed(task: ServingTask, *ranges: tuple[int, int]) -> ServingPlan:
    shares = [HeldRange(last, first, member) for member, (first, last) in enumerate(ranges)]
    return plan_of_placement(Evaluator(task), shares, "by hand")


def decode_s(task: ServingTask, member: int, first: int, last: int, context: int) -> float:
    load = msgspec.structs.replace(task.load, context_tokens=float(context))
    return stage_s(task.model, task.members[member].device, load, first, last)


def prompt_s(task: ServingTask, member: int, first: int, last: int, tokens: int) -> float:
    """A prompt of one pass: products of all tokens but the head's, triangular attention, weights read once."""
    model, device, part = task.model, task.members[member].device, slice(first, last)
    counts = np.where(model.last_only_S[part] > 0, 1, tokens)
    products = float((counts * model.flops_S[part]).sum()) / device.flops_per_s["matmul"]
    pairs = tokens * (tokens + 1) / 2
    attention = pairs * float(model.attention_flops_S[part].sum()) / device.flops_per_s["attention"]
    moved = float(model.read_bytes_S[part].sum()) + tokens * float(model.kv_bytes_S[part].sum())
    starts = float(model.operators_S[part].sum()) * device.overhead_s
    return max(products + attention, moved / device.memory_bytes_per_s, starts)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_one_request_on_one_machine() -> None:
    task = task_of(machine("a"))
    report = simulate_serving(task, placed(task, (0, 4)), [Request(0.5, 100, 4)])
    first = prompt_s(task, 0, 0, 4, 100)
    steps = [decode_s(task, 0, 0, 4, 100 + made) for made in (1, 2, 3)]
    assert report.prompt_latency.mean_s == pytest.approx(first)
    assert report.token_latency.mean_s == pytest.approx(sum(steps) / 3)
    assert report.measured_to_s == pytest.approx(0.5 + first + sum(steps))
    assert report.finished == 1
    assert report.tokens_per_s == pytest.approx(4 / report.measured_to_s)
    (use,) = report.machines
    assert use.utilisation == pytest.approx((first + sum(steps)) / report.measured_to_s)
    assert use.mean_batch == 1


def test_one_request_over_two_machines_and_back() -> None:
    task = task_of(machine("a"), machine("b", bandwidth=5e10), owner=machine("owner"))
    report = simulate_serving(task, placed(task, (0, 2), (2, 4)), offline([(100, 3)]))
    first = 100 * 8 / RATE + 100 * HIDDEN_BYTES / RATE + 8 / RATE + 3 * DELAY_S
    first += prompt_s(task, 0, 0, 2, 100) + prompt_s(task, 1, 2, 4, 100)
    assert report.prompt_latency.mean_s == pytest.approx(first)
    way = (8 + HIDDEN_BYTES + 8) / RATE + 3 * DELAY_S
    steps = [way + decode_s(task, 0, 0, 2, 100 + made) + decode_s(task, 1, 2, 4, 100 + made) for made in (1, 2)]
    assert report.token_latency.mean_s == pytest.approx(sum(steps) / 2)


def test_a_long_prompt_goes_in_chunks_that_overlap() -> None:
    task = task_of(machine("a", flops=1e11), machine("b", flops=1e11), lengths=(512, 2))
    plan = placed(task, (0, 2), (2, 4))
    whole = simulate_serving(task, msgspec.structs.replace(plan, prompt_chunk=512), offline([(512, 2)]))
    chunked = simulate_serving(task, plan, offline([(512, 2)]))
    assert plan.prompt_chunk == 256
    assert chunked.prompt_latency.mean_s is not None
    assert whole.prompt_latency.mean_s is not None
    # The second machine works on the first chunk while the first machine works on the second one.
    assert chunked.prompt_latency.mean_s < 0.85 * whole.prompt_latency.mean_s


def test_the_owner_embeds_and_samples_in_private_serving() -> None:
    owner = machine("owner", bandwidth=2e9)
    task = task_of(machine("a"), owner=owner, private=True)
    report = simulate_serving(task, placed(task, (1, 3)), offline([(100, 3)]))
    head = 2.5e7 / 2e9
    way = 2 * (HIDDEN_BYTES / RATE + DELAY_S)
    starts = 1e-6  # the embedding reads next to nothing
    steps = [starts + way + decode_s(task, 0, 1, 3, 100 + made) + head for made in (1, 2)]
    assert report.token_latency.mean_s == pytest.approx(sum(steps) / 2, rel=1e-9)
    first = starts + 100 * HIDDEN_BYTES / RATE + HIDDEN_BYTES / RATE + 2 * DELAY_S + prompt_s(task, 0, 1, 3, 100) + head
    assert report.prompt_latency.mean_s == pytest.approx(first, rel=1e-6)


def test_a_request_waits_for_room_in_the_cache() -> None:
    """With room for one request the second begins when the first ends, and none is lost."""
    lengths = (100, 4)
    roomy = task_of(machine("a"), lengths=lengths)
    fixed = float(Evaluator(roomy).times.fixed_bytes[0, 0, 4])
    tight = machine("a", memory=(fixed + 1.5 * 2 * 1000.0 * 104) * 1.15)
    task = task_of(tight, lengths=lengths)
    report = simulate_serving(task, placed(task, (0, 4)), offline([lengths, lengths]))
    alone = simulate_serving(task, placed(task, (0, 4)), offline([lengths]))
    assert report.finished == 2
    assert report.measured_to_s == pytest.approx(2 * alone.measured_to_s)
    assert report.machines[0].most_cached == pytest.approx(1 / 1.5, rel=1e-5)
    assert report.mean_sequences == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="fits no route"):
        simulate_serving(task, placed(task, (0, 4)), offline([(200, 4)]))


def test_two_requests_share_passes() -> None:
    task = task_of(machine("a"), lengths=(10, 50))
    one = simulate_serving(task, placed(task, (0, 4)), offline([(10, 50)]))
    two = simulate_serving(task, placed(task, (0, 4)), offline([(10, 50), (10, 50)]))
    assert two.machines[0].mean_batch > 1.9
    assert two.tokens_per_s > 1.8 * one.tokens_per_s


def test_the_plans_batch_limits_a_pass() -> None:
    task = task_of(machine("a"), lengths=(10, 50))
    plan = placed(task, (0, 4))
    narrow = msgspec.structs.replace(plan, shards=tuple(msgspec.structs.replace(s, batch=2) for s in plan.shards))
    report = simulate_serving(task, narrow, offline([(10, 50)] * 6))
    assert 1 <= report.machines[0].mean_batch <= 2


def test_measuring_starts_after_the_warm_up() -> None:
    task = task_of(machine("a"), lengths=(10, 50))
    plan = placed(task, (0, 4))
    whole = simulate_serving(task, plan, offline([(10, 50)] * 20))
    late = simulate_serving(task, plan, offline([(10, 50)] * 20), warm_up_s=whole.measured_to_s / 2)
    assert late.measured_from_s == whole.measured_to_s / 2
    assert 0 < late.machines[0].utilisation <= 1
    with pytest.raises(ConfigError, match="warm_up_s"):
        simulate_serving(task, plan, offline([(10, 50)]), warm_up_s=1e6)


def test_a_plan_of_another_model_is_refused() -> None:
    task = task_of(machine("a"))
    plan = msgspec.structs.replace(placed(task, (0, 4)), graph_hash="other")
    with pytest.raises(ConfigError, match="plan the task again"):
        simulate_serving(task, plan, offline([(10, 2)]))


# --- links and routes -----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s, self.events, self.order = 0.0, [], itertools.count()
        self.arrived: list[tuple[float, str]] = []

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when_s, next(self.order), call))

    def run(self) -> list[tuple[float, str]]:
        while self.events:
            self.now_s, _, call = heapq.heappop(self.events)
            call()
        return self.arrived

    def wire(self, *, in_turn: bool = False) -> Wire:
        return Wire(
            100.0,
            1.0,
            lambda what: self.arrived.append((round(self.now_s, 9), what)),
            self.at,
            lambda: self.now_s,
            in_turn=in_turn,
        )


def test_messages_go_before_prompts_and_prompts_go_on_after_them() -> None:
    clock = Clock()
    wire = clock.wire()
    clock.at(0.0, lambda: wire.send_bulk(1000.0, "prompt"))  # alone: 10 s
    clock.at(0.0, lambda: wire.send_bulk(100.0, "next prompt"))
    clock.at(2.0, lambda: wire.send(100.0, "token"))  # 1 s
    clock.at(2.5, lambda: wire.send(50.0, "token 2"))  # waits half a second, then half a second
    assert clock.run() == [(4.0, "token"), (4.5, "token 2"), (12.5, "prompt"), (13.5, "next prompt")]


def test_in_turn_a_token_waits_for_the_prompt() -> None:
    clock = Clock()
    wire = clock.wire(in_turn=True)
    clock.at(0.0, lambda: wire.send_bulk(1000.0, "prompt"))
    clock.at(2.0, lambda: wire.send(100.0, "token"))
    assert clock.run() == [(11.0, "prompt"), (12.0, "token")]


def test_routes_are_taken_in_proportion_to_flows() -> None:
    task = task_of(machine("a"), machine("b"))
    plan = placed(task, (0, 4), (0, 4))

    def flow(source: str, target: str, rate: float) -> FlowPlan:
        return FlowPlan(source=source, target=target, tokens_per_s=rate, capacity_tokens_per_s=rate)

    plan = msgspec.structs.replace(plan, flows=(flow("", "a", 3), flow("", "b", 1), flow("a", "", 3), flow("b", "", 1)))
    kv = [[0.0, 0.0, 1.0, 2.0, 2.0]] * 2
    router = Router(plan, kv, [1e6, 1e6])
    taken = [route[0].machine for _ in range(8) if (route := router.route(10))]
    assert taken.count(0) == 6
    assert sorted(taken[:4]) == sorted(taken[4:]) == [0, 0, 0, 1]  # interleaved, not in blocks
    full = Router(plan, kv, [5.0, 1e6])
    route = full.route(10)
    assert route is not None
    assert route[0].machine == 1  # the other has no room
    full.release(route, 10)
    assert full.room_bytes == [5.0, 1e6]


# --- against max-flow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [s for s in range(40) if math.isfinite(least_token_s(random_task(s)))][::3])
def test_no_run_gives_more_than_the_max_flow(seed: int) -> None:
    """Requests of unlike lengths, many at once; the ceiling is that of exactly these requests."""
    lengths = Lengths(prompt_tokens=60, output_tokens=20, longest_prompt=400, longest_output=100).draw(150, seed)
    task = random_task(seed)
    task = ServingTask(
        **{name: getattr(task, name) for name in ("model", "members", "links", "owner", "private", "precision")},
        load=load_of(lengths),
    )
    plan = plan_serving(task)
    if any(shard.sequences < 4 for shard in plan.shards):
        pytest.skip("the longest request may not fit")
    report = simulate_serving(task, plan, offline(lengths))
    assert report.finished == 150
    assert report.tokens_per_s <= plan.ceiling_tokens_per_s * (1 + 1e-9)
    assert report.tokens_per_s <= plan.bound_tokens_per_s * (1 + 1e-9) or not plan.bound_tokens_per_s > 0


def test_a_full_pipeline_gives_about_what_is_predicted() -> None:
    lengths = [(64, 40)] * 1500
    members = tuple(machine(f"m{k}", memory=3.2e8, flops=1e14) for k in range(3))
    task = task_of(*members, blocks=6, lengths=lengths[0])
    plan = placed(task, (0, 3), (3, 5), (5, 8))
    report = simulate_serving(task, plan, offline(lengths), until_s=6.0, warm_up_s=2.0)
    assert report.tokens_per_s == pytest.approx(plan.predicted_tokens_per_s, rel=0.15)
    assert report.token_latency.mean_s == pytest.approx(plan.predicted_token_s, rel=0.2)


# --- requests and clusters ------------------------------------------------------------------------------------------


def test_lengths_have_their_means_and_limits() -> None:
    lengths = Lengths()
    drawn = lengths.draw(20_000, seed=3)
    assert drawn == lengths.draw(20_000, seed=3)
    assert drawn != lengths.draw(20_000, seed=4)
    assert sum(prompt for prompt, _ in drawn) / 20_000 == pytest.approx(750, rel=0.02)
    assert sum(output for _, output in drawn) / 20_000 == pytest.approx(240, rel=0.02)
    assert max(prompt for prompt, _ in drawn) <= 2048
    assert min(min(each) for each in drawn) >= 1
    with pytest.raises(ConfigError, match=r"lengths\.prompt_tokens"):
        Lengths(prompt_tokens=2000)


def test_poisson_arrivals_come_at_their_rate() -> None:
    requests = poisson([(1, 1)] * 5000, 2.5, seed=1)
    assert requests[-1].arrival_s == pytest.approx(5000 / 2.5, rel=0.05)
    gaps = np.diff([each.arrival_s for each in requests])
    assert float(gaps.std()) == pytest.approx(0.4, rel=0.1)  # an exponential's spread is its mean
    with pytest.raises(ConfigError, match="requests_per_s"):
        poisson([(1, 1)], 0.0, seed=1)


def test_percentiles_are_values_that_occurred() -> None:
    spread = spread_of([4.0, 1.0, 3.0, 2.0])
    assert (spread.mean_s, spread.p50_s, spread.p95_s) == (2.5, 2.0, 4.0)
    assert spread_of([]).mean_s is None


def test_helix_clusters_have_the_published_machines() -> None:
    counts = {
        cluster.name: (len(cluster.members), sum(count for region in cluster.regions for _, count in region))
        for cluster in CLUSTERS
    }
    assert counts == {"single": (24, 24), "geo-distributed": (24, 24), "high-heterogeneity": (42, 64)}
    links, index = GEO_DISTRIBUTED.links, np.asarray
    assert float(links.bandwidths_bytes_per_s(index(0), index(3))) == 1.25e9
    assert float(links.bandwidths_bytes_per_s(index(0), index(4))) == 12.5e6
    assert float(links.rtts_s(index(4), index(14))) == 0.1
    assert float(links.rtts_s(index(0), index(24))) == 0.1  # the coordinator is far from everybody
