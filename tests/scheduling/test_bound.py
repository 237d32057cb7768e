"""The least time of a step: never above what a plan predicts, and exact where machines are alike."""

from __future__ import annotations

from itertools import product

import pytest
from decoder_graph import SIZES, decoder, member, pool

from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import cut
from fusionai.scheduling.bound import least_step_s
from fusionai.scheduling.estimator import backward_s, forward_s, update_s
from fusionai.scheduling.planner import plan_training
from fusionai.scheduling.profile import DeviceProfile, Member

GRAPH = decoder(6)
(WHOLE,) = cut(GRAPH, [])
COST = stage_cost(WHOLE, SIZES)


def bound(*members: Member, microbatches: int = 4) -> float:
    devices = [each.device for each in members]
    return least_step_s(COST, devices, microbatches=microbatches, precision="fp32", optimizer_states=2)


def alone_s(device: DeviceProfile, microbatches: int = 4) -> float:
    passes_s = forward_s(COST, device, "fp32") + backward_s(COST, device, "fp32")
    return microbatches * passes_s + update_s(COST, device, 2)


def test_one_machine_has_its_own_time() -> None:
    one = member("a", gflops=50)
    assert bound(one) == pytest.approx(alone_s(one.device))


def test_alike_machines_share_the_work() -> None:
    one = member("a", gflops=50)
    assert bound(one, one, one) == pytest.approx(alone_s(one.device) / 3)


def test_the_better_at_each_kind_of_work_does_it() -> None:
    """Total work over the sum of speeds would be no bound here: each machine is good at something else."""
    products, memory = member("a"), member("b")
    fast = {name: 100 * rate for name, rate in products.device.flops_per_s.items()}
    a = DeviceProfile(**{**fields(products), "flops_per_s": fast, "overhead_s": 0.0})
    b = DeviceProfile(
        **{**fields(memory), "memory_bytes_per_s": 100 * memory.device.memory_bytes_per_s, "overhead_s": 0.0}
    )
    least_s = least_step_s(COST, [a, b], microbatches=4, precision="fp32", optimizer_states=2)
    divided_s = max(
        4 * sum((COST.forward_flops[k] + COST.backward_flops[k]) / fast[k] for k in COST.forward_flops),
        4 * (COST.forward_bytes + COST.backward_bytes) / b.memory_bytes_per_s + update_s(COST, b, 2),
    )
    assert 0 < least_s <= divided_s
    assert divided_s < 1 / (1 / alone_s(a) + 1 / alone_s(b))


def fields(member: Member) -> dict[str, object]:
    return {name: getattr(member.device, name) for name in DeviceProfile.__struct_fields__}


@pytest.mark.parametrize(("count", "device", "microbatches"), list(product((1, 3), ("cpu", "cuda:0"), (1, 8))))
def test_no_plan_is_faster(count: int, device: str, microbatches: int) -> None:
    members = [member(f"m{k}", gflops=40.0 * (k + 1), device=device) for k in range(count)]
    links = pool(*members, rtt_s=0.0, bytes_per_s=1e15)
    plan = plan_training(
        GRAPH,
        graph_hash="",
        sizes=SIZES,
        microbatches=microbatches,
        optimizer_states=2,
        precision="fp32",
        pool=links,
        owner=members[0],
        privacy="open",
        front=0,
        back=len(GRAPH.nodes),
    )
    assert bound(*members, microbatches=microbatches) <= plan.predicted_step_s * (1 + 1e-9)
