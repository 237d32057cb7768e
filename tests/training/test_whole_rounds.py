"""Whole jobs on scripted machines give the bits of one program for each machine, called in a plain loop."""

from __future__ import annotations

import asyncio
import math
import random

import numpy as np
import pytest
from fake_plane import data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_pool import ScriptedPool, peer_of
from toy_pipelines import (
    OWNER,
    ROWS,
    STATES,
    WIDTH,
    Layer,
    Pipeline,
    Reference,
    batch,
    chain,
    evaluating_by,
    noise,
    three_machines,
)

from fusionai.errors import DataError, GraphError, JobError
from fusionai.graph.cuts import cut
from fusionai.graph.evaluation import face
from fusionai.graph.model import WeightKey
from fusionai.network.clock import run_scripted
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.network.limits import Limits
from fusionai.pool.identifiers import Epoch
from fusionai.training.handing_over import hand_over
from fusionai.training.messages import Boundary

NAMES = (OWNER, "a", "b", "c")


def test_two_steps_and_an_evaluation_equal_the_reference() -> None:
    async def main() -> None:
        reference = Reference(three_machines())
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(three_machines())
            for step in range(2):
                [result] = await pool.train(driver, 1, first=step)
                assert result.loss == reference.train_step(batch(step, 2), [0.5, 0.5], 0.125)
                assert result.reports.keys() == {machine.peer for machine in driver.machines}
            assert await pool.tensors(driver) == reference.tensors()
            evaluated = await driver.evaluate(batch(9, 3), [0.25, 0.25, 0.5])
            assert evaluated.loss == reference.evaluate(batch(9, 3), [0.25, 0.25, 0.5])
            assert evaluated.gradient_norm == 0
            assert await pool.tensors(driver) == reference.tensors(), "an evaluation changes nothing"
            await driver.close("done")
            await pool.until(lambda: not pool.holding(), within_s=1)
            assert [machine.ended for machine in pool.machines.values()] == [[], ["done"], ["done"], ["done"]]

    run_scripted(main())


def test_a_microbatch_without_a_share_is_not_run() -> None:
    """Its loss may be 0/0, and 0 times that is in no sum."""

    async def main() -> None:
        reference = Reference(three_machines())
        first, second, third = batch(0, 3)
        empty = {**second, "y": data(np.full((ROWS, WIDTH), np.nan))}
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(three_machines())
            result = await driver.train_step(0, [first, empty, third], [0.25, 0.0, 0.75], 0.125)
            assert result.loss == reference.train_step([first, third], [0.25, 0.75], 0.125)
            assert result.microbatches == 2
            assert await pool.tensors(driver) == reference.tensors()
            evaluated = await driver.evaluate([empty, first], [0.0, 3.0])
            assert evaluated.loss == reference.evaluate([first], [3.0])
            with pytest.raises(DataError, match="none of the 2 microbatches has a share in the loss"):
                await driver.train_step(1, [empty, empty], [0.0, 0.0], 0.125)
            [result] = await pool.train(driver, 1, first=1)
            assert result.loss == reference.train_step(batch(1, 2), [0.5, 0.5], 0.125), "nothing had begun"

    run_scripted(main())


def evaluated_otherwise() -> Pipeline:
    """In evaluation a value of a goes to c too, and a further weight is used; in training a sends to b only."""
    layers = [Layer("embedding"), Layer("middle"), Layer("embedding")]
    graph = evaluating_by(chain(layers), chain([*layers[:2], Layer("embedding", skip=1), Layer("further")]))
    return Pipeline(graph, (1, 2), ("a", "b", "c"))


def test_another_evaluation_goes_its_own_way() -> None:
    pipeline = evaluated_otherwise()
    ways = {(each.source, each.target) for part in pipeline.subdags for each in face(part, train=False).sends}
    assert ways == {(0, 1), (0, 2), (1, 2)}
    assert not any(each.target == 2 for each in pipeline.subdags[0].sends)

    async def main() -> None:
        reference = Reference(pipeline)
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(pipeline)
            for step in range(2):
                evaluated = await driver.evaluate(batch(9, 3), [0.25, 0.25, 0.5])
                assert evaluated.loss == reference.evaluate(batch(9, 3), [0.25, 0.25, 0.5])
                [result] = await pool.train(driver, 1, first=step)
                assert result.loss == reference.train_step(batch(step, 2), [0.5, 0.5], 0.125)
                assert result.loss != evaluated.loss
            found = await pool.tensors(driver)
            assert found == {name: tensor for name, tensor in reference.tensors().items() if name in found}
            assert found["further", None] == bytes(noise("further").data)
            assert ("further", STATES[0]) not in found

    run_scripted(main())


def test_a_tensor_of_the_other_mode_is_refused() -> None:
    """What a sends to c in evaluation is not due in training, and ends the job."""

    async def main() -> None:
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(evaluated_otherwise())
            round_of_c = pool.machines["c"].hosts[driver.epoch]
            value = next(each for each in face(round_of_c.share.subdags[0], train=False).receives if each.source == 0)
            header = Boundary(driver.job, driver.epoch, 0, 0, value.value, 0, 2, False, "float64", (ROWS, WIDTH))
            sent = asyncio.ensure_future(pool.machines["a"].wire.send(peer_of("c"), header, noise("x", ROWS)))
            with pytest.raises(JobError):
                await pool.train(driver, 1)
            await asyncio.wait({sent}, timeout=5)
            assert any("not due" in reason for machine in pool.machines.values() for reason in machine.ended)

    run_scripted(main())


def test_a_run_is_repeated_event_by_event() -> None:
    """What fault scripts rest on: the same program comes by the same points in the same order."""

    async def main() -> list[str]:
        async with ScriptedPool(*NAMES) as pool:
            await pool.train(await pool.launch(three_machines()), 2)
            return [str(each.point) for each in pool.faults.seen]

    first, second = run_scripted(main()), run_scripted(main())
    assert first == second
    assert len(first) > 100


def test_scripted_seconds_are_the_pipelines() -> None:
    """Forwards of 1 s and backwards of 2 s, in three stages, on two microbatches; links take nothing."""
    seconds = {"forward": 1.0, "backward": 2.0}

    async def main() -> None:
        lab = LabConfig(default=EmulatedLink())
        async with ScriptedPool(*NAMES, lab=lab, duration_s=lambda machine, call: seconds.get(call.kind, 0.0)) as pool:
            [result] = await pool.train(await pool.launch(three_machines()), 1)
            # Fill and drain: (2 + 3 - 1) slots of 1 s + 2 s each.
            assert result.seconds == pytest.approx(12.0)
            for report in result.reports.values():
                assert report.busy_s == pytest.approx(6.0)
                assert sum(report.forward_s.values()) == pytest.approx(2.0)
                assert sum(report.backward_s.values()) == pytest.approx(4.0)

    run_scripted(main())


def test_three_holders_of_one_weight_sum_in_one_order() -> None:
    """Sums of three depend on their order in the last bits: every holder takes the last stage first."""
    layers = [Layer("shared"), Layer("shared", skip=0), Layer("shared", skip=1)]
    pipeline = Pipeline(chain(layers), (1, 3), ("a", "b", "c"))

    async def main() -> None:
        reference = Reference(pipeline)
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(pipeline)
            await pool.train(driver, 4, microbatches=3)
            for step in range(4):
                reference.train_step(batch(step, 3), [1 / 3] * 3, 0.125)
            assert await pool.tensors(driver) == reference.tensors()
            await asyncio.sleep(1)  # the other two have heard of the last commit by then, too
            held = {bytes(pool.machines[name].program.read(WeightKey("shared")).data) for name in "abc"}
            assert held == {reference.tensors()["shared", None]}

    run_scripted(main())


def test_a_step_that_is_not_finite_is_dropped_everywhere() -> None:
    async def main() -> None:
        reference = Reference(three_machines())
        reference.train_step(batch(0, 2), [0.5, 0.5], 0.125)
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(three_machines())
            await pool.train(driver, 1)
            bad = batch(1, 2)
            bad[1] = {**bad[1], "x": data([[math.nan] * WIDTH] * ROWS)}
            with pytest.raises(JobError, match="the loss is nan at step 2; the step was not applied"):
                await driver.train_step(1, bad, [0.5, 0.5], 0.125)
            assert await pool.tensors(driver) == reference.tensors()
            assert [machine.program.discards for name, machine in pool.machines.items() if name != OWNER] == [1, 1, 1]
            # The machines themselves are as good as before.
            [result] = await pool.train(driver, 1, first=1)
            assert result.loss == reference.train_step(batch(1, 2), [0.5, 0.5], 0.125)

    run_scripted(main())


def test_training_goes_on_by_another_plan() -> None:
    """From three machines to two, with other cuts: weights, momentum and the shared weight move, and nothing else."""
    old = three_machines()
    new = Pipeline(old.graph, (2,), ("c", "a"))

    async def main() -> None:
        reference = Reference(old)
        for step in range(4):
            reference.train_step(batch(step, 2), [0.5, 0.5], 0.125)
        async with ScriptedPool(*NAMES) as pool:
            running = await pool.launch(old)
            await pool.train(running, 2)
            following = await pool.launch(new, Epoch(1), prepare=False, handing=old)
            result = await hand_over(running, following, STATES, optimizer_step=2)
            assert result.bytes_moved > 0
            await running.close("it goes on by another plan")
            await pool.train(following, 2, first=2)
            found = await pool.tensors(following)
            expected = reference.tensors()
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                # Sums over holders come in another order by the other plan.
                assert memoryview(tensor).cast("d").tolist() == pytest.approx(
                    memoryview(expected[name]).cast("d").tolist(), rel=1e-12
                )
            assert all(machine.program.optimizer_step() == 4 for machine in map(pool.machines.get, "ac") if machine)

    run_scripted(main())


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Two to five layers with skips and shared weights, cut anywhere, on up to three machines and the owner."""
    layers = []
    for number in range(draw(st.integers(2, 5))):
        skip = draw(st.none() | st.integers(0, number))
        layers.append(Layer(draw(st.sampled_from(("u", "v", f"w{number}"))), skip))
    graph = chain(layers)
    places = range(1, len(graph.nodes))
    cuts = tuple(sorted(draw(st.sets(st.sampled_from(places), max_size=4))))
    try:
        stages = len(cut(graph, cuts))
    except GraphError:
        cuts, stages = (), 1
    holders = tuple(draw(st.sampled_from(NAMES)) for _ in range(stages))
    in_flight = {stage: draw(st.integers(1, 3)) for stage in range(stages)}
    return Pipeline(graph, cuts, holders, in_flight)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pipeline=pipelines(), microbatches=st.integers(1, 4), seed=st.integers(0, 1 << 16))
def test_any_pipeline_equals_its_reference(pipeline: Pipeline, microbatches: int, seed: int) -> None:
    """However long passes and messages take, and however little the links let through at once."""
    slow = random.Random(seed)
    lab = LabConfig(
        links={
            f"{one}->{other}": EmulatedLink(rate_mbit=slow.uniform(0.1, 100), one_way_ms=slow.uniform(0, 30))
            for one in NAMES
            for other in NAMES
            if one != other
        }
    )
    limits = Limits(window_bytes=slow.choice([4096, 1 << 20]))
    shares = [slow.uniform(0.5, 1.5) for _ in range(microbatches)]
    weights = [each / sum(shares) for each in shares]

    async def main() -> None:
        reference = Reference(pipeline)
        async with ScriptedPool(
            *NAMES, lab=lab, limits=limits, duration_s=lambda machine, call: slow.uniform(0, 0.02)
        ) as pool:
            driver = await pool.launch(pipeline)
            for step in range(2):
                result = await driver.train_step(step, batch(step, microbatches), weights, 0.1)
                expected = reference.train_step(batch(step, microbatches), weights, 0.1)
                assert result.loss == pytest.approx(expected, rel=1e-6)
                held_out = batch(100 + step, 2, rows=3)
                evaluated = await driver.evaluate(held_out, [0.5, 0.5])
                assert evaluated.loss == pytest.approx(reference.evaluate(held_out, [0.5, 0.5]), rel=1e-6)
            assert await pool.tensors(driver) == reference.tensors()

    run_scripted(main())
