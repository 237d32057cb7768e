"""Uplinks and downlinks that all links of a machine share: planners reckon with them as the simulator does."""

from __future__ import annotations

import random
from typing import Any

import pytest
from small_requests import load, private, request

from fusionai.errors import PlacementError
from fusionai.simulation.forecast.forecast import forecast
from fusionai.simulation.forecast.request import Request, part_of, plan_on, setting_of, with_owner
from fusionai.simulation.forecast.simulated_job import SimulationOptions, simulate_on_pool
from fusionai.simulation.hardware.what_if_pool import WhatIfPool


def homes(draw: random.Random) -> WhatIfPool:
    machines = [
        {
            "name": f"m{number}",
            "up_mbps": draw.choice((5, 20, 100, 1000)),
            "down_mbps": draw.choice((50, 250, 1000)),
            "matmul_tflops": draw.choice((0.2, 1.0, 5.0)),
        }
        for number in range(draw.randint(1, 5))
    ]
    return load(*machines, owner={"up_mbps": draw.choice((10, 40, 1000)), "down_mbps": draw.choice((100, 1000))})


@pytest.mark.parametrize("pipelines", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_simulated_step_takes_what_was_planned(seed: int, pipelines: bool) -> None:
    draw = random.Random(seed)
    what_if, fields = homes(draw), {"microbatches": draw.choice((2, 8, 32))}
    asked = private(**fields) if draw.random() < 0.6 else request(**fields)
    given = SimulationOptions(steps=2)
    found = simulate_on_pool(asked, what_if, given, job_steps=2, pipelines=pipelines, clock_s=iter([0.0, 1.0]).__next__)
    # Of two tensors that find a line free, either may take it first.
    assert found.report.median_step_s == pytest.approx(found.predicted_step_s, rel=0.02)


def test_the_owner_has_one_uplink() -> None:
    # Two machines would double a line that the owner had for each of its links.
    owner = {"up_mbps": 20, "down_mbps": 20}
    one = forecast(private(), load({}, owner=owner), what_ifs=False)
    two = forecast(private(), load({"count": 2}, owner=owner), what_ifs=False)
    assert two.predicted_step_s == pytest.approx(one.predicted_step_s, rel=1e-6)
    split = forecast(private(compnodes=2), load({"count": 2}, owner=owner), what_ifs=False)
    assert split.bottleneck.startswith(("the uplink of owner", "the downlink of owner"))
    assert split.busiest_share > 0.5


@pytest.mark.parametrize("seed", range(12))
def test_one_more_machine_never_makes_a_step_longer(seed: int) -> None:
    draw = random.Random(seed)
    what_if = with_owner(homes(draw), "open")
    asked = request(microbatches=draw.choice((4, 16))) if draw.random() < 0.5 else private()
    every = plan_on(asked, setting_of(what_if)).predicted_step_s
    for left_out in range(len(what_if.members) if len(what_if.members) > 1 else 0):
        kept = [number for number in range(len(what_if.members)) if number != left_out]
        assert every <= plan_on(asked, setting_of(part_of(what_if, kept))).predicted_step_s * (1 + 1e-9)


def test_a_fast_machine_far_away_is_left_out() -> None:
    near, far = {"name": "near", "region": "eu"}, {"name": "far", "region": "us", "matmul_tflops": 1.5}
    regions: dict[str, Any] = {
        "regions": [{"name": "eu", "rtt_ms": 1}, {"name": "us", "rtt_ms": 1}],
        "routes": [{"between": ["eu", "us"], "rtt_ms": 200}],
    }
    pool = load(near, far, owner={"region": "eu"}, **regions)
    found = forecast(request(), pool, what_ifs=False)
    assert [each.machine for each in found.stages] == ["near"]
    alone = forecast(request(), load(far, owner={"region": "eu"}, **regions), what_ifs=False)
    assert alone.bottleneck.startswith("reporting to owner and updating")


def test_machines_that_the_job_names_are_the_only_ones() -> None:
    pool = load({"name": "a", "matmul_tflops": 5.0}, {"name": "b"}, {"name": "c"}, owner={})
    found = forecast(request(machines=("c",)), pool)
    assert [each.machine for each in found.stages] == ["c"]
    assert {each.machine for each in found.alone} <= {"c", "owner"}
    half = len(request().problem.graph.nodes) // 2
    ordered = forecast(request(machines=("c", "a"), cuts=(half,)), pool, what_ifs=False)
    assert [each.machine for each in ordered.stages] == ["c", "a"]
    given = SimulationOptions(steps=1)
    executed = simulate_on_pool(
        named("c", "b"), pool, given, job_steps=1, pipelines=False, clock_s=iter([0.0, 1.0]).__next__
    )
    assert {executed.names[each.peer] for each in executed.report.machines} <= {"b", "c", "owner"}
    with pytest.raises(PlacementError, match=r"placement.machines names cc, but .* did you mean c\?"):
        forecast(named("cc"), pool)
    with pytest.raises(PlacementError, match="its machines are a, b, c"):
        forecast(named("zebra"), pool)


def named(*machines: str) -> Request:
    return request(machines=machines)
