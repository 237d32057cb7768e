"""Rates from timed passes, and a device measured by them."""

from __future__ import annotations

import pytest

from fusionai.execution.calibration.passes import time_stage
from fusionai.execution.calibration.rates import Timing, solved
from fusionai.execution.calibration.reference_graph import DecoderShape, reference_stage
from fusionai.execution.plane import Plane
from fusionai.graph.cost import stage_cost
from fusionai.graph.dependencies import deferrable

SMALL = DecoderShape(layers=2, hidden=64, inner=96, heads=4, vocabulary=128, batch=2, tokens=16)


def test_rates_are_those_that_made_the_timings() -> None:
    rates = (2e-11, 5e-11, 1e-10, 4e-6)
    amounts = [(1e9, 1e7, 1e6, 100), (5e9, 1e7, 9e6, 300), (1e8, 3e8, 1e6, 50), (1e5, 1e3, 1e4, 400), (1e8, 0, 3e8, 10)]
    timings = [Timing(each, sum(amount * rate for amount, rate in zip(each, rates, strict=True))) for each in amounts]
    assert solved(timings) == pytest.approx(rates, rel=1e-3)


def test_no_rate_is_negative_and_what_was_not_seen_is_zero() -> None:
    # The second pass has more of everything and takes less time: no rates fit, and none turns negative.
    found = solved([Timing((1e9, 100.0, 0.0), 1.0), Timing((2e9, 300.0, 0.0), 0.5)])
    assert min(found) >= 0
    assert found[2] == 0


def test_the_reference_stage_is_one_of_a_pipeline() -> None:
    stage = reference_stage(SMALL)
    assert [each.gradient for each in stage.receives] == [True]
    assert stage.loss is not None
    assert deferrable(stage), "a plane treats its linears as those of any later stage"
    cost = stage_cost(stage, SMALL.sizes)
    rows = SMALL.batch * SMALL.tokens
    linear = 4 * SMALL.hidden**2 + 3 * SMALL.hidden * SMALL.inner
    assert cost.forward_flops["matmul"] == 2 * rows * (SMALL.layers * linear + SMALL.hidden * SMALL.vocabulary)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_pass_is_timed(any_plane: Plane, precision: str) -> None:
    found = time_stage(any_plane, "cpu", SMALL, "bf16" if precision == "bf16" else "fp32", 0.05)
    assert 0 < found.forward_s < 10
    assert 0 < found.backward_s < 10
    assert 0 < found.update_s < 10
