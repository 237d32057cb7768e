"""The least time of a step: never above what a plan predicts, and exact where machines are alike."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations, product

import msgspec
import pytest
from decoder_graph import GB, SIZES, decoder, member, pool
from every_plan_of_pipelines import best_single_step_s, best_step_of_several_s
from training_problems import one_pipeline

from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import cut, cut_points
from fusionai.scheduling import planner
from fusionai.scheduling.bound import least_step_of_pipelines_s, least_step_s, most_microbatches_per_s
from fusionai.scheduling.estimator import backward_s, forward_s, update_s
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import DeviceProfile, LinkProfile, Member, Pool
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.step_bound import least_s

GRAPH = decoder(6)
(WHOLE,) = cut(GRAPH, [])
COST = stage_cost(WHOLE, SIZES)
PARTS = [stage_cost(part, SIZES) for part in cut(GRAPH, cut_points(GRAPH, SIZES))]


def bound(*members: Member, microbatches: int = 4) -> float:
    devices = [each.device for each in members]
    return least_step_s(PARTS, devices, microbatches=microbatches, precision="fp32", optimizer_states=2)


def alone_s(device: DeviceProfile, microbatches: int = 4) -> float:
    passes_s = forward_s(COST, device, "fp32") + backward_s(COST, device, "fp32")
    return microbatches * passes_s + update_s(COST.trainable_bytes, device, 2)


def test_one_machine_has_its_own_time() -> None:
    one = member("a", gflops=50)
    assert bound(one) == pytest.approx(alone_s(one.device))


def test_alike_machines_share_the_work() -> None:
    one = member("a", gflops=50)
    assert bound(one, one, one) == pytest.approx(alone_s(one.device) / 3)


def test_the_better_at_each_part_does_it() -> None:
    """Total work over the sum of speeds would be no bound here: each machine is good at something else."""
    products, memory = member("a"), member("b")
    fast = {name: 100 * rate for name, rate in products.device.flops_per_s.items()}
    a = DeviceProfile(**{**fields(products), "flops_per_s": fast, "overhead_s": 0.0})
    b = DeviceProfile(
        **{**fields(memory), "memory_bytes_per_s": 100 * memory.device.memory_bytes_per_s, "overhead_s": 0.0}
    )
    nothing = dict.fromkeys(COST.forward_flops, 0)
    computed = replace(COST, forward_bytes=0, backward_bytes=0, trainable_bytes=0)
    moved = replace(COST, forward_flops=nothing, backward_flops=nothing)
    found_s = least_step_s([computed, moved], [a, b], microbatches=4, precision="fp32", optimizer_states=2)
    divided_s = max(
        4 * sum((COST.forward_flops[k] + COST.backward_flops[k]) / fast[k] for k in COST.forward_flops),
        4 * (COST.forward_bytes + COST.backward_bytes) / b.memory_bytes_per_s + update_s(COST.trainable_bytes, b, 2),
    )
    assert 0 < found_s <= divided_s
    assert divided_s < 1 / (1 / alone_s(a) + 1 / alone_s(b))


def test_a_part_is_done_by_one_machine_with_all_that_is_in_it() -> None:
    """Products on one machine and the moving of bytes on another would be faster, but no plan can part them."""
    products, memory = member("a"), member("b")
    a = msgspec.structs.replace(products.device, overhead_s=0.0, memory_bytes_per_s=1e8)
    slow = {name: rate / 100 for name, rate in memory.device.flops_per_s.items()}
    b = msgspec.structs.replace(memory.device, overhead_s=0.0, flops_per_s=slow, memory_bytes_per_s=1e12)
    whole_s = least_step_s([COST], [a, b], microbatches=4, precision="fp32", optimizer_states=2)
    halves = cut(GRAPH, [len(GRAPH.nodes) // 2])
    halves_s = least_step_s(
        [stage_cost(each, SIZES) for each in halves], [a, b], microbatches=4, precision="fp32", optimizer_states=2
    )
    assert whole_s >= halves_s * (1 - 1e-9), "finer parts leave more freedom"
    assert halves_s > 0.3 / (1 / alone_s(a) + 1 / alone_s(b))


def fields(member: Member) -> dict[str, object]:
    return {name: getattr(member.device, name) for name in DeviceProfile.__struct_fields__}


@pytest.mark.parametrize(("count", "device", "microbatches"), list(product((1, 3), ("cpu", "cuda:0"), (1, 8))))
def test_no_plan_is_faster(count: int, device: str, microbatches: int) -> None:
    members = [member(f"m{k}", gflops=40.0 * (k + 1), device=device) for k in range(count)]
    links = pool(*members, rtt_s=0.0, bytes_per_s=1e15)
    plan = planner.plan(one_pipeline(GRAPH, links, members[0], microbatches=microbatches))
    assert bound(*members, microbatches=microbatches) <= plan.predicted_step_s * (1 + 1e-9)


class TestManyPipelines:
    def least(self, rates: list[float], alone: list[bool] | None = None, **changes: float) -> float:
        options: dict[str, float] = {
            "microbatches": 100,
            "most_stages": 4,
            "most_pipelines": 100,
            "weight_bytes": 0.0,
            "crossing_bytes": 0.0,
            "bandwidth_bytes_per_s": 10.0,
            "delay_s": 0.0,
        }
        return least_step_of_pipelines_s(0.0, rates, alone or [False] * len(rates), **(options | changes))  # type: ignore[arg-type]

    def test_free_links_leave_the_rates(self) -> None:
        assert self.least([1.0, 4.0, 5.0]) == pytest.approx(10.0)

    def test_a_single_pipeline_has_as_many_machines_as_stages(self) -> None:
        assert self.least([1.0, 4.0, 5.0], most_stages=2, most_pipelines=1) == pytest.approx(100 / 9)

    def test_each_linked_pipeline_passes_what_a_link_does(self) -> None:
        # Four pipelines at most, of which each passes 10 / 5 microbatches a second; the last two machines may be alone.
        rates = [9.0] * 6 + [7.0, 3.0]
        alone = [False] * 6 + [True, True]
        assert self.least(rates, alone, crossing_bytes=5.0, most_pipelines=4) == pytest.approx(100 / (7 + 3 + 2 + 2))

    def test_without_links_there_is_one_machine(self) -> None:
        found = self.least([9.0, 7.0, 5.0], [True, True, True], crossing_bytes=5.0, bandwidth_bytes_per_s=0.0)
        assert found == pytest.approx(100 / 9)

    def test_more_pipelines_pay_for_their_sum(self) -> None:
        # One pipeline: 100 / 2 s. R of them: 50 / R s and a sum of 2 (R - 1) 40 / 8 / 10 s.
        found = self.least([9.0] * 8, crossing_bytes=5.0, weight_bytes=40.0)
        assert found == pytest.approx(min(50 / count + (count - 1) for count in range(1, 9)))

    def test_the_fastest_machine_adds_what_it_does_alone_and_others_at_least_that(self) -> None:
        devices = [member("a", gflops=50).device, member("b", gflops=100).device]
        options = {"microbatches": 4, "precision": "fp32", "optimizer_states": 2}
        slow, fast = most_microbatches_per_s([COST], devices, **options)  # type: ignore[arg-type]
        assert fast == pytest.approx(4 / alone_s(devices[1]))
        assert slow >= 4 / alone_s(devices[0])


@pytest.mark.parametrize("seed", range(60))
def test_no_plan_of_any_number_of_pipelines_is_faster(seed: int) -> None:
    """Against the best of all plans of small pools, whose machines are good at different kinds of work."""
    draw = random.Random(seed)
    machines = draw.randint(2, 3)
    members = []
    for number in range(machines):
        one = member(f"m{number}", gflops=draw.uniform(20, 200), memory_bytes=GB, device=draw.choice(["cpu", "cuda:0"]))
        moved = one.device.memory_bytes_per_s * 10 ** draw.uniform(-1.5, 0.5)
        device = msgspec.structs.replace(one.device, memory_bytes_per_s=moved, overhead_s=draw.choice([0.0, 1e-5]))
        members.append(msgspec.structs.replace(one, device=device))
    links = {
        f"{one.peer}>{other.peer}": LinkProfile(1e-5, 10 ** draw.uniform(7, 10))
        for one, other in permutations(members, 2)
    }
    graph = decoder(draw.choice((1, 2, 3)), hidden=draw.choice((32, 64)), tied=draw.random() < 0.5)
    task = TrainingProblem(
        graph=graph,
        graph_hash="",
        sizes=SIZES,
        microbatches=draw.choice((1, 2, 4)),
        optimizer_states=2,
        precision="fp32",
        members=tuple(members),
        owner=None,
        links=PoolLinks(Pool(tuple(members), links), [each.peer for each in members]),
        privacy="open",
        front=0,
        back=len(graph.nodes),
    )
    work = costs_in_segments(task)
    best_s = best_single_step_s(work)
    best_s = min(best_s, best_step_of_several_s(work, best_s))
    assert 0 < least_s(work) <= best_s * (1 + 1e-9)
