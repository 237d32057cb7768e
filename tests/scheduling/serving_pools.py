"""Small pools for serving, what holds of every plan of theirs, and what is best on them by trying everything."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import numpy as np
import pytest

from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.profile import DeviceProfile, LinkProfile, Member, Pool
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.serving.load import ServingLoad, load_of
from fusionai.scheduling.serving.serving_estimator import CHUNK_TOKENS
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_model import TOKEN_BYTES, ServingModel
from fusionai.scheduling.serving.serving_plan import ServingPlan
from fusionai.scheduling.serving.serving_planner import plan_serving
from fusionai.scheduling.serving.serving_task import ServingTask
from fusionai.scheduling.serving.throughput import best_throughput

HIDDEN_BYTES = 2048.0

LOAD = load_of([(100, 20)])


def small_model(blocks: int, *, weight: float = 1e8, kv: float = 1000.0) -> ServingModel:
    """Return a decoder whose blocks have so many bytes of weights, read once a pass, and cache bytes a token."""
    segments = blocks + 2

    def row(first: float, block: float, head: float) -> np.ndarray:
        return np.asarray([first, *[block] * blocks, head])

    return ServingModel(
        name="small",
        graph_hash="small",
        positions=tuple(range(0, 10 * segments + 1, 10)),
        weight_bytes_S=row(weight / 4, weight, weight / 4),
        read_bytes_S=row(0.0, weight, weight / 4),
        flops_S=row(0.0, weight, weight / 4),
        attention_flops_S=row(0.0, 100.0, 0.0),
        moved_bytes_S=row(0.0, 0.0, 0.0),
        kv_bytes_S=row(0.0, kv, 0.0),
        operators_S=row(1.0, 10.0, 2.0),
        last_only_S=row(0.0, 0.0, 1.0),
        crossing_bytes_P=np.asarray([TOKEN_BYTES, *[HIDDEN_BYTES] * (segments - 1), TOKEN_BYTES]),
    )


def machine(
    name: str, *, memory: float = 1e9, bandwidth: float = 1e11, flops: float = 1e13, dialable: bool = True
) -> Member:
    """Return a GPU."""
    device = DeviceProfile(
        name, "cuda:0", "torch", "1", int(memory), 1, {"matmul": flops, "attention": flops}, bandwidth, 1e-6
    )
    return Member(name, name, device, (), dialable)


def random_task(seed: int, *, objective: str = "throughput") -> ServingTask:
    """Return a pool of two to four machines for up to five segments, some of them private or hard to reach."""
    draw = random.Random(seed)
    model = small_model(draw.randint(1, 3), kv=draw.choice((500.0, 20_000.0)))
    count = draw.randint(2, 4) if model.blocks < 3 else draw.randint(2, 3)
    members = tuple(
        machine(
            f"m{index}",
            memory=draw.uniform(1.2e8, 6e8),
            bandwidth=10 ** draw.uniform(10, 11.5),
            flops=10 ** draw.uniform(12, 13.5),
            dialable=draw.random() < 0.8,
        )
        for index in range(count)
    )
    owner = machine("owner", memory=4e9, dialable=True)
    peers = [*(each.peer for each in members), "owner"]
    links = {
        f"{one}>{other}": LinkProfile(10 ** draw.uniform(-4, -1.5), 10 ** draw.uniform(5.5, 9))
        for one, other in itertools.permutations(peers, 2)
    }
    return ServingTask(
        model=model,
        members=members,
        links=PoolLinks(Pool(members, links), peers),
        load=load_of([(draw.randint(20, 200), draw.randint(5, 50))]),
        objective=objective,  # type: ignore[arg-type]
        owner=owner,
        private=draw.random() < 0.3,
        precision="fp32",
    )


def stage_s(model: ServingModel, device: DeviceProfile, load: ServingLoad, first: int, last: int) -> float:
    """Return the seconds of one stream's decode pass over [first, last), by the roofline, written out."""
    part = slice(first, last)
    kv = float(model.kv_bytes_S[part].sum()) * load.context_tokens
    moved = float(model.read_bytes_S[part].sum() + model.moved_bytes_S[part].sum()) + kv
    products = float(model.flops_S[part].sum()) / device.flops_per_s["matmul"]
    attention = float(model.attention_flops_S[part].sum()) * load.context_tokens / device.flops_per_s["attention"]
    starts = float(model.operators_S[part].sum()) * device.overhead_s
    return max(moved / device.memory_bytes_per_s, products + attention, starts)


def fits(model: ServingModel, device: DeviceProfile, load: ServingLoad, first: int, last: int) -> bool:
    """Whether weights, working space and the cache of one request fit a machine."""
    part = slice(first, last)
    working = 4 * CHUNK_TOKENS * float(model.crossing_bytes_P.max())
    cache = float(model.kv_bytes_S[part].sum()) * load.reserved_tokens
    return (float(model.weight_bytes_S[part].sum()) + working + cache) * MEMORY_MARGIN <= device.memory_bytes


def least_token_s(task: ServingTask) -> float:
    """Return the least seconds between two tokens of a stream: every order of machines, every cut."""
    model, load, links = task.model, task.load, task.links
    owner_s = 0.0
    if task.private:
        assert task.owner is not None
        device = task.owner.device
        parts = [(0, 1), (task.back, task.back + 1)]
        moved = sum(float(model.read_bytes_S[a:b].sum()) for a, b in parts) / device.memory_bytes_per_s
        products = sum(float(model.flops_S[a:b].sum()) for a, b in parts) / device.flops_per_s["matmul"]
        owner_s = max(moved, products, sum(float(model.operators_S[a:b].sum()) for a, b in parts) * device.overhead_s)

    def hop_s(source: int, target: int, position: int) -> float:
        if not (task.machines[source].dialable or task.machines[target].dialable):
            return math.inf
        one, other = np.asarray(source), np.asarray(target)
        return float(
            links.rtts_s(one, other) / 2 + model.crossing_bytes_P[position] / links.bandwidths_bytes_per_s(one, other)
        )

    best, front, back, gateway = math.inf, task.front, task.back, task.gateway
    for stages in range(1, min(len(task.members), back - front) + 1):
        for order in itertools.permutations(range(len(task.members)), stages):
            for inner in itertools.combinations(range(front + 1, back), stages - 1):
                bounds = (front, *inner, back)
                way = (gateway, *order, gateway)
                parts = list(zip(order, bounds, bounds[1:], strict=False))
                if not all(fits(model, task.members[m].device, load, a, b) for m, a, b in parts):
                    continue
                seconds = sum(stage_s(model, task.members[m].device, load, a, b) for m, a, b in parts)
                seconds += sum(hop_s(a, b, p) for a, b, p in zip(way, way[1:], bounds, strict=False))
                best = min(best, seconds + owner_s)
    return best


def most_tokens_per_s(task: ServingTask) -> float:
    """Return the most tokens per second of any placement, as the evaluator says: every range for every machine."""
    evaluator = Evaluator(task)
    front, back, count = task.front, task.back, len(task.members)
    ranges = [(0, 0), *itertools.combinations(range(front, back + 1), 2)]
    # A segment passes no more than what its holders would if their tokens came back at once.
    rate = evaluator.times.tokens_per_s(np.asarray(0.0))
    candidates = []
    for chosen in itertools.product(ranges, repeat=count):
        held = np.zeros(back - front)
        for member, (first, last) in enumerate(chosen):
            if last > first:
                held[first - front : last - front] += rate[evaluator.kind_of[member], first, last]
        if held.min() > 0:
            candidates.append((float(held.min()), chosen))
    best = 0.0
    for bound, chosen in sorted(candidates, reverse=True):
        if bound <= best:
            break
        found = evaluator.evaluate(
            [HeldRange(last, first, m) for m, (first, last) in enumerate(chosen) if last > first]
        )
        if found is not None:
            best = max(best, found.tokens_per_s)
    return best


def latency_is_optimal(seed: int) -> bool:
    """Whether the planner's route on a random pool is the best of all; where there is none it must say so."""
    task = random_task(seed, objective="latency")
    best = least_token_s(task)
    if math.isinf(best):
        return Evaluator(task) is not None
    plan = plan_serving(task)
    return abs(plan.predicted_token_s / best - 1) < 1e-9 and plan.bound_token_s == plan.predicted_token_s


def gaps(seeds: Iterable[int]) -> list[tuple[float, float]]:
    """Return, by pool that can hold the model, how much less than the best the search and the planner give."""
    found = []
    for seed in seeds:
        task = random_task(seed)
        best = most_tokens_per_s(task)
        if best > 0:
            searched = best_throughput(Evaluator(task), whole=False)
            planned = plan_serving(task).predicted_tokens_per_s
            found.append((1 - (searched.evaluated.tokens_per_s if searched else 0.0) / best, 1 - planned / best))
    return found


def links_of_pool(members: tuple[Member, ...], owner: bool, rate: float = 1e9, rtt_s: float = 2e-3) -> PoolLinks:
    peers = [*(each.peer for each in members), *(["owner"] if owner else [])]
    pairs = {f"{one}>{other}": LinkProfile(rtt_s, rate) for one, other in itertools.permutations(peers, 2)}
    return PoolLinks(Pool(members, pairs), peers)


def task_of(*members: Member, blocks: int = 3, **more: object) -> ServingTask:
    owner = more.get("owner")
    fields: dict[str, object] = {
        "links": links_of_pool(members, owner is not None),
        "load": LOAD,
        "precision": "fp32",
        **more,
    }
    return ServingTask(model=small_model(blocks), members=members, **fields)  # type: ignore[arg-type]


def check(task: ServingTask, plan: ServingPlan) -> None:
    """Assert what every plan must keep."""
    model, peers = task.model, {member.peer: member for member in task.members}
    assert plan.graph_hash == model.graph_hash
    inflow: dict[str, float] = {}
    outflow: dict[str, float] = {}
    shards = {shard.peer: shard for shard in plan.shards}
    for flow in plan.flows:
        assert flow.tokens_per_s <= flow.capacity_tokens_per_s * (1 + 1e-6)
        inflow[flow.target] = inflow.get(flow.target, 0.0) + flow.tokens_per_s
        outflow[flow.source] = outflow.get(flow.source, 0.0) + flow.tokens_per_s
        if flow.source in shards and flow.target in shards:
            assert shards[flow.target].first <= shards[flow.source].last < shards[flow.target].last
            assert peers[flow.source].dialable or peers[flow.target].dialable
    assert outflow[plan.owner] == pytest.approx(plan.predicted_tokens_per_s, rel=1e-6)
    assert inflow[plan.owner] == pytest.approx(plan.predicted_tokens_per_s, rel=1e-6)
    for shard in plan.shards:
        assert (shard.start, shard.stop) == (model.positions[shard.first], model.positions[shard.last])
        assert task.front <= shard.first < shard.last <= task.back
        assert inflow[shard.peer] == pytest.approx(shard.tokens_per_s, rel=1e-6)
        assert outflow[shard.peer] == pytest.approx(shard.tokens_per_s, rel=1e-6)
        assert shard.tokens_per_s <= shard.capacity_tokens_per_s * (1 + 1e-6)
        assert shard.sequences >= 1
        assert shard.memory_bytes <= peers[shard.peer].device.memory_bytes
    assert {*shards, *plan.left_out} == set(peers)
    assert plan.predicted_tokens_per_s <= plan.bound_tokens_per_s * (1 + 1e-9)
    assert plan.predicted_tokens_per_s <= plan.ceiling_tokens_per_s * (1 + 1e-6)
    assert plan.bound_token_s <= plan.predicted_token_s * (1 + 1e-9)
