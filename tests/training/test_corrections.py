"""Stage times tell which machines drifted: noise does not, slow-downs and speed-ups soon do."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from decoder_graph import decoder, member, pool
from every_plan import OWNER, planned, slowed
from training_problems import one_pipeline

from fusionai.errors import ConfigError
from fusionai.scheduling.evaluation import evaluated_again
from fusionai.scheduling.plan import Plan
from fusionai.training.corrections import NOTICED, Corrections, MeasuredPasses, corrected

GRAPH = decoder(12)
POOL = pool(member("a"), member("b", gflops=80), member("c", gflops=120), owner=OWNER)
RUNNING = planned(GRAPH, POOL, 8, compnodes=3)
PEERS = [stage.peer for stage in RUNNING.stages]


def times(plan: Plan, factors: dict[str, float], draw: random.Random, noise: float) -> list[MeasuredPasses]:
    """Return one step's times, each stage's with lognormal noise of this standard deviation."""
    return [
        MeasuredPasses(
            stage.peer,
            stage.stage,
            plan.microbatches * stage.predicted.forward_s * factor,
            plan.microbatches * stage.predicted.backward_s * factor,
            plan.microbatches,
        )
        for stage in plan.stages
        for factor in (factors.get(stage.peer, 1.0) * math.exp(draw.gauss(0, noise)),)
    ]


def run(watched: Corrections, steps: range, factors: dict[str, float], draw: random.Random, noise: float) -> int | None:
    """Observe steps until something drifted; return that step."""
    for step in steps:
        watched.observe(step, times(RUNNING, factors, draw, noise))
        if watched.drifted():
            return step
    return None


@pytest.mark.parametrize("noise", [0.05, 0.1])
def test_noise_is_no_drift(noise: float) -> None:
    """No report in 3 machines x 100 steps x 20 runs."""
    for seed in range(20):
        watched = Corrections(RUNNING)
        assert run(watched, range(100), {}, random.Random(seed), noise) is None
        assert watched.factors() == pytest.approx(dict.fromkeys(PEERS, 1.0), rel=0.15)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0, 1 / 1.5, 1 / 3])
def test_a_change_is_noticed_within_a_few_steps(noise: float, factor: float) -> None:
    waits = []
    for seed in range(30):
        draw, watched = random.Random(seed), Corrections(RUNNING)
        assert run(watched, range(20), {}, draw, noise) is None
        noticed = run(watched, range(20, 40), {PEERS[1]: factor}, draw, noise)
        assert noticed is not None
        waits.append(noticed - 19)
        (drift,) = watched.drifted()
        assert drift.peer == PEERS[1]
        assert drift.factor == pytest.approx(factor, rel=0.25 if noise else 1e-9), "not a mixture with what was before"
        assert 16 <= drift.since_step <= 22
        assert noise or drift.since_step == 20
    assert max(waits) <= 8
    assert sorted(waits)[len(waits) // 2] <= 4


def test_without_noise_three_steps_suffice_and_two_do_not() -> None:
    watched = Corrections(RUNNING)
    draw = random.Random(0)
    assert run(watched, range(10), {}, draw, 0.0) is None
    assert run(watched, range(10, 20), {PEERS[0]: 1.5}, draw, 0.0) == 12
    assert watched.drifted()[0].since_step == 10


def test_a_single_slow_step_is_no_drift() -> None:
    watched, draw = Corrections(RUNNING), random.Random(1)
    for step in range(40):
        watched.observe(step, times(RUNNING, {PEERS[0]: 10.0} if step % 8 == 4 else {}, draw, 0.05))
        assert watched.drifted() == ()


def test_faster_again_is_noticed_relative_to_the_plan() -> None:
    """The plan for the throttled machine reckons with it: its recovery is a drift."""
    throttled = slowed(POOL, PEERS[0], 2.0)
    plan = evaluated_again(one_pipeline(GRAPH, throttled, OWNER), RUNNING).plan()
    watched, draw = Corrections(plan), random.Random(2)
    for step in range(10):
        watched.observe(step, times(plan, {}, draw, 0.05))
    assert watched.drifted() == ()
    for step in range(10, 15):
        watched.observe(step, times(plan, {PEERS[0]: 0.5}, draw, 0.05))
    (drift,) = watched.drifted()
    assert drift.factor == pytest.approx(0.5, rel=0.1)


def test_slow_drift_is_noticed_too() -> None:
    watched, draw = Corrections(RUNNING), random.Random(3)
    found = None
    for step in range(100):
        watched.observe(step, times(RUNNING, {PEERS[2]: 1 + step / 100}, draw, 0.05))
        if found is None and watched.drifted():
            found = step
    assert found is not None
    assert 15 <= found <= 45
    assert watched.factors()[PEERS[2]] == pytest.approx(1.95, rel=0.1)


def test_a_settled_drift_is_reported_once() -> None:
    watched, draw = Corrections(RUNNING), random.Random(4)
    assert run(watched, range(10), {PEERS[0]: 1.5}, draw, 0.05) == 2
    watched.settle()
    assert run(watched, range(10, 40), {PEERS[0]: 1.5}, draw, 0.05) is None
    assert watched.factors()[PEERS[0]] == pytest.approx(1.5, rel=0.1)
    assert run(watched, range(40, 50), {}, draw, 0.05) is not None, "back to what the plan reckons, and changed"


def test_few_or_foreign_times_say_nothing() -> None:
    watched, draw = Corrections(RUNNING), random.Random(5)
    foreign = [
        MeasuredPasses("p-nobody", 0, 1.0, 1.0, 8),
        MeasuredPasses(PEERS[0], 2, 1.0, 1.0, 8),
        MeasuredPasses(PEERS[0], 0, 0.0, 0.0, 8),
        MeasuredPasses(PEERS[0], 0, 1.0, math.nan, 8),
        MeasuredPasses(PEERS[0], 0, 1.0, 1.0, 0),
    ]
    for step in range(5):
        watched.observe(step, foreign)
    assert watched.factors() == {}
    for step in range(2):
        watched.observe(step, times(RUNNING, {PEERS[0]: 9.0}, draw, 0.0))
        assert watched.factors() == {}
    watched.observe(2, times(RUNNING, {PEERS[0]: 9.0}, draw, 0.0)[:1])
    assert watched.factors() == pytest.approx({PEERS[0]: 9.0})
    assert watched.predicted_step_s() > RUNNING.predicted_step_s


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("peer", PEERS)
def test_the_step_with_factors_is_that_of_corrected_devices(peer: str, factor: float) -> None:
    """Within 5 % of the schedule with the corrected device, in a network that does not hide everything."""
    watched, draw = Corrections(RUNNING), random.Random(6)
    for step in range(3):
        watched.observe(step, times(RUNNING, {peer: factor}, draw, 0.0))
    problem = one_pipeline(GRAPH, slowed(POOL, peer, factor), OWNER)
    assert watched.predicted_step_s() == pytest.approx(evaluated_again(problem, RUNNING).step_s, rel=0.05)


def test_a_corrected_device_takes_that_much_longer() -> None:
    problem = one_pipeline(GRAPH, POOL, OWNER)
    device = msgspec.structs.replace(problem.member(PEERS[0]).device, update_bytes_per_s=5e9)
    slow = corrected(device, 2.0)
    assert slow.memory_bytes == device.memory_bytes
    members = [
        msgspec.structs.replace(problem.member(peer), device=slow if peer == PEERS[0] else problem.member(peer).device)
        for peer in PEERS
    ]
    before = RUNNING.stages[0].predicted
    changed = msgspec.structs.replace(POOL, members=tuple(members))
    got = evaluated_again(problem.on_pool(changed, OWNER), RUNNING).plan().stages[0].predicted
    assert got.forward_s == pytest.approx(2 * before.forward_s)
    assert got.backward_s == pytest.approx(2 * before.backward_s)
    assert slow.update_bytes_per_s == 2.5e9
    assert corrected(corrected(device, 3.0), 1 / 3).flops_per_s == pytest.approx(device.flops_per_s)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_impossible_factors(factor: float) -> None:
    with pytest.raises(ConfigError, match="factor must be a positive number"):
        corrected(POOL.members[0].device, factor)


@pytest.mark.parametrize(("window", "fewest"), [(8, 0), (2, 3)])
def test_impossible_windows(window: int, fewest: int) -> None:
    with pytest.raises(ConfigError, match="fewest must be between 1 and window"):
        Corrections(RUNNING, window=window, fewest=fewest)


def test_what_is_noticed_is_between_noise_and_a_slow_down() -> None:
    assert 1.1 * 1.1 < NOTICED < 1.5
