"""A GPU with the model's state in main memory, and rented cards: against figures worked out by hand, and plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest
from small_requests import load, private, request

from fusionai.cli.forecast_words import sentences
from fusionai.errors import PlacementError
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.estimator import backward_s, forward_s
from fusionai.scheduling.profile import DeviceProfile, Member
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.simulation.forecast.forecast import forecast
from fusionai.simulation.forecast.offload import BUS_BYTES_PER_S, MAIN_MEMORY_BYTES_PER_S, offloaded
from fusionai.simulation.forecast.rented import each_rented
from fusionai.simulation.forecast.request import plan_at_home
from fusionai.simulation.forecast.simulated_job import SimulationOptions, simulate_on_pool
from fusionai.simulation.hardware.catalogue import everything, lookup
from fusionai.simulation.hardware.efficiency import profile_of
from fusionai.units.byte_counts import bytes_text

COST = request().whole_cost
LARGEST = max(type_bytes(weight.type, {}) for weight in request().problem.graph.weights)
KEPT = 8 * sum(part.receive_bytes for part in request().part_costs)
"""What crosses between parts, of eight microbatches."""
LEAST = COST.transient_bytes + 2 * LARGEST


def card(tflops: float, room_bytes: float) -> DeviceProfile:
    """Return a GPU with so much room beyond what an operator needs."""
    memory_bytes = int((LEAST + room_bytes) * MEMORY_MARGIN) + 2
    given = profile_of(lookup("RTX 3080"))
    rates = {"matmul": tflops * 1e12, "attention": tflops * 1e12}
    return msgspec.structs.replace(
        given, memory_bytes=memory_bytes, flops_per_s=rates, memory_bytes_per_s=1e15, overhead_s=0.0
    )


def test_a_slow_card_computes_and_a_fast_one_waits_for_copies() -> None:
    slow, fast = card(0.01, COST.saved_bytes), card(1e6, COST.saved_bytes)
    forward, backward = forward_s(COST, slow, "fp32"), backward_s(COST, slow, "fp32")
    found = offloaded(request(), slow)
    assert found is not None
    assert found.step_s == pytest.approx(8 * (forward + backward), rel=1e-9), "activations have room: none twice"
    assert found.limit == "computing"
    assert found.main_memory_bytes == 4 * COST.trainable_bytes + COST.other_bytes, "nothing crosses: all stays"
    found = offloaded(request(), fast)
    assert found is not None
    once_s = (2 * COST.weight_bytes + KEPT) / BUS_BYTES_PER_S
    update_s = 9 * COST.trainable_bytes / MAIN_MEMORY_BYTES_PER_S
    assert found.step_s == pytest.approx(max(once_s, update_s)), "layer by layer, since computing again costs nothing"
    assert found.main_memory_bytes == 4 * COST.trainable_bytes + COST.other_bytes + KEPT
    half = offloaded(request(precision="bf16"), fast)
    assert half is not None
    assert half.step_s == pytest.approx(max((COST.weight_bytes + KEPT) / BUS_BYTES_PER_S, update_s))


def test_without_room_for_activations_forwards_are_computed_again() -> None:
    tight = card(0.01, COST.saved_bytes / 2)
    found = offloaded(request(), tight)
    assert found is not None
    forward, backward = forward_s(COST, tight, "fp32"), backward_s(COST, tight, "fp32")
    assert found.step_s == pytest.approx(8 * (2 * forward + backward), rel=1e-9)


def test_many_microbatches_at_a_time_save_copies() -> None:
    """Where copies for each microbatch would take longer than computing forwards again, layers come once a step."""
    for tflops in (0.01, 0.1, 1.0, 10.0, 100.0):
        device = card(tflops, COST.saved_bytes)
        forward, backward = forward_s(COST, device, "fp32"), backward_s(COST, device, "fp32")
        once_s = 2 * COST.weight_bytes / BUS_BYTES_PER_S
        by_layers = max(8 * (2 * forward + backward), once_s + KEPT / BUS_BYTES_PER_S)
        by_microbatches = 8 * max(forward + backward, once_s)
        found = offloaded(request(), device)
        assert found is not None
        update_s = 9 * COST.trainable_bytes / MAIN_MEMORY_BYTES_PER_S
        assert found.step_s == pytest.approx(max(update_s, min(by_layers, by_microbatches)))


def test_where_it_is_no_way_out() -> None:
    assert offloaded(request(), card(1.0, -0.01 * LEAST)) is None
    one_part = max(part.saved_bytes for part in request().part_costs)
    assert offloaded(request(), card(1.0, 0.9 * one_part)) is None, "computed again, one part must fit"
    assert offloaded(request(), card(1.0, 1.1 * one_part)) is not None
    for device in ("cpu", "mps"):
        assert offloaded(request(), msgspec.structs.replace(card(1.0, 1e9), device=device)) is None


def test_rented_cards_are_those_with_a_price() -> None:
    found = each_rented(request(), 2.0)
    assert {each.hardware for each in found} == {each.name for each in everything() if each.rent_per_hour}
    assert [each.usd_per_million_tokens for each in found] == sorted(each.usd_per_million_tokens for each in found)
    for each in found:
        hardware = lookup(each.hardware)
        member = Member("card", each.hardware, profile_of(hardware), (), True)
        assert each.main_memory_bytes == 0
        assert each.predicted_step_s == plan_at_home(request(), member).predicted_step_s
        assert each.speedup == pytest.approx(2.0 / each.predicted_step_s)
        an_hour = 3600 / each.predicted_step_s * request().tokens_per_step
        assert each.usd_per_million_tokens == pytest.approx(each.usd_per_hour / (an_hour / 1e6))


def test_a_card_that_holds_too_little_is_rented_with_main_memory() -> None:
    heavy = request(optimizer_states=400)
    found = {each.hardware: each for each in each_rented(heavy, 1.0)}
    with_main_memory = {name: each for name, each in found.items() if each.main_memory_bytes}
    assert lookup("T4").name in with_main_memory
    assert lookup("H100 SXM").name not in with_main_memory
    for name, each in with_main_memory.items():
        expected = offloaded(heavy, profile_of(lookup(name)))
        assert expected is not None
        assert each.predicted_step_s == expected.step_s
        state_bytes = 402 * COST.trainable_bytes + COST.other_bytes
        assert each.main_memory_bytes in (state_bytes, state_bytes + KEPT)


def test_the_owner_learns_what_its_own_card_would_reach() -> None:
    tight = {"gpu": "RTX 3080", "memory": None, "matmul_tflops": None, "memory_gb": None, "memory_gb_per_s": None}
    what_if = load({**tight, "count": 4, "name": "a"}, mbps=10_000, owner=tight)
    needs = COST.training_bytes(2, 2) / 2
    small = dataclasses.replace(
        what_if,
        members=tuple(with_memory(each, needs) for each in what_if.members),
        owner=with_memory(what_if.owner, needs) if what_if.owner else None,
    )
    found = forecast(private(), small, job_steps=500)
    by_name = {each.machine: each for each in found.alone}
    assert by_name["owner"].predicted_step_s is None
    assert by_name["owner"].offload is not None
    assert by_name["owner"].offload == offloaded(private(), small.owner.device if small.owner else card(1, 1))
    assert by_name["a-1"].offload is None, "of a private job parts must stay with the owner"
    assert found.job_s == 500 * found.predicted_step_s
    words = "\n".join(sentences(found))
    assert "All 500 steps of the job: about " in words
    assert "in main memory" in words
    assert "owner alone would reach about " in words
    assert "Rented instead, the cheapest by token is one " in words
    assert found.board_w == 320.0 * len({stage.machine for stage in found.stages})
    assert found.electricity_usd_per_million_tokens == pytest.approx(
        found.board_w / 1000 * 0.15 / 3600 / found.tokens_per_s * 1e6
    )


def test_a_pool_that_is_too_small_says_what_else_could_train_the_job() -> None:
    card_of = {"gpu": "RTX 3080", "matmul_tflops": None, "memory_gb": None, "memory_gb_per_s": None}
    what_if = load(card_of, owner=card_of)
    heavy = private(optimizer_states=400)
    with pytest.raises(PlacementError) as refused:
        forecast(heavy, what_if)
    assert what_if.owner is not None
    own = offloaded(heavy, what_if.owner.device)
    assert own is not None
    assert f"owner by itself with {bytes_text(own.main_memory_bytes)} of main memory" in str(refused.value)
    assert f"(about {heavy.tokens_per_step / own.step_s:,.0f} tokens/s" in str(refused.value)
    cheapest = each_rented(heavy, 1.0)[0]
    assert f"or one rented {cheapest.hardware}" in str(refused.value)
    with pytest.raises(PlacementError) as short:
        forecast(heavy, what_if, what_ifs=False)
    assert str(refused.value).startswith(f"{short.value}. What could train it: ")


def test_an_owner_that_holds_the_job_is_not_told_to_offload() -> None:
    """Nobody can be linked with it: its own device is a way out, at the speed of a plan for it alone."""
    card_of = {"gpu": "RTX 3080", "matmul_tflops": None, "memory_gb": None, "memory_gb_per_s": None, "dialable": False}
    what_if = load(card_of, owner=card_of)
    assert what_if.owner is not None
    tokens_per_s = private().tokens_per_step / plan_at_home(private(), what_if.owner).predicted_step_s
    own = f"owner by itself, whose {what_if.owner.device.name} holds the whole job (about {tokens_per_s:,.0f} tokens/s)"
    for text in (
        refusal(lambda: forecast(private(), what_if)),
        refusal(
            lambda: simulate_on_pool(
                private(), what_if, SimulationOptions(steps=1), job_steps=1, pipelines=False, clock_s=float
            )
        ),
        refusal(
            lambda: simulate_on_pool(
                private(), what_if, SimulationOptions(steps=1), job_steps=1, pipelines=True, clock_s=float
            )
        ),
    ):
        assert f". What could train it: {own}, or one rented " in text
        assert "offloads" not in text
        assert text.endswith("A cloud would see the data, which this job keeps on the owner's machine")
    assert "A cloud" not in refusal(lambda: forecast(request(), what_if))


def refusal(asked: Callable[[], object]) -> str:
    with pytest.raises(PlacementError) as refused:
        asked()
    return str(refused.value)


def with_memory(member: Member, memory_bytes: float) -> Member:
    device = msgspec.structs.replace(member.device, memory_bytes=int(memory_bytes))
    return msgspec.structs.replace(member, device=device)
