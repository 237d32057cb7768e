"""Trials: what churn, codecs, sweeps, rent and many pipelines do to a job's plan."""

from __future__ import annotations

from typing import Any

import pytest
from small_requests import load, private, request

from fusionai.cli.simulation_words import sentences
from fusionai.errors import ConfigError
from fusionai.simulation.forecast.forecast import forecast
from fusionai.simulation.forecast.request import Request, best_on, plan_on, setting_of, with_owner
from fusionai.simulation.forecast.simulated_job import SimulatedJob, SimulationOptions, simulate_on_pool
from fusionai.simulation.hardware.catalogue import lookup
from fusionai.simulation.hardware.what_if_pool import WhatIfPool
from fusionai.simulation.simulated_recovery import Replay, Restart

POOL = load({"count": 4, "name": "a"})


def simulated_job(asked: Request, what_if: WhatIfPool = POOL, *, pipelines: bool = False, **given: Any) -> SimulatedJob:
    given = {"steps": 4, **given}
    return simulate_on_pool(
        asked,
        what_if,
        SimulationOptions(**given),
        job_steps=1000,
        pipelines=pipelines,
        clock_s=iter([1.0, 3.5]).__next__,
    )


def test_the_plan_is_that_of_a_forecast() -> None:
    for asked, what_if in ((request(compnodes=2), POOL), (private(), load({"count": 2}, owner={}))):
        found = simulated_job(asked, what_if)
        assert found.plan == plan_on(asked, setting_of(with_owner(what_if, asked.problem.privacy)))
        assert found.planning_s == 2.5
        assert found.pipelines == 1
        assert found.report.median_step_s == pytest.approx(found.predicted_step_s, rel=0.05)
        assert found.job is not None
        assert found.job.elapsed_s == pytest.approx(250 * found.report.elapsed_s)


def test_machines_are_busy_as_the_forecast_says() -> None:
    for asked, what_if in ((request(compnodes=2), POOL), (private(), load({"count": 2}, owner={}))):
        found = simulated_job(asked, what_if)
        busy = {row.machine: row.busy for row in forecast(asked, what_if, what_ifs=False).stages}
        simulated = {found.names[each.peer]: each.utilisation for each in found.report.machines}
        # Passes and the update, once a machine.
        assert {name: simulated[name] for name in busy} == pytest.approx(busy, rel=0.02)


def test_many_pipelines() -> None:
    asked = request(microbatches=64)
    found = simulated_job(asked, pipelines=True)
    assert found.plan == best_on(asked, with_owner(POOL, "open"))
    assert found.pipelines > 1
    assert len(found.report.machines) == len(found.plan.peers)
    assert any("Training runs one today" in line for line in sentences(found))
    with pytest.raises(ConfigError, match=r"--pipelines: .* placement.compnodes=0"):
        simulated_job(request(compnodes=2), pipelines=True)


def test_churn_is_drawn_from_the_seed() -> None:
    asked = request(compnodes=2)
    step_s = simulated_job(asked).report.median_step_s
    given = {"steps": 300, "mean_up_s": 60 * step_s, "mean_down_s": 5 * step_s}
    kept = {"snapshot_steps": 10, "detection_s": step_s / 10}
    stormy = simulated_job(asked, seed=1, recovery=Replay(**kept), **given)
    assert stormy.report.failures
    assert stormy.report.elapsed_s > 300 * step_s
    assert any(line.startswith("Failures of machines at work: ") for line in sentences(stormy))
    assert simulated_job(asked, seed=1, recovery=Replay(**kept), **given).report == stormy.report
    assert simulated_job(asked, seed=2, recovery=Replay(**kept), **given).report.failures != stormy.report.failures
    restarted = simulated_job(asked, seed=1, recovery=Restart(**kept), **given)
    assert restarted.report.elapsed_s > stormy.report.elapsed_s, "everybody goes back"


def test_a_job_that_does_not_get_through_has_no_time() -> None:
    found = simulated_job(request(compnodes=2), load({"count": 2}), steps=1000, mean_up_s=1e-3, mean_down_s=1e12)
    assert not found.report.finished
    assert found.job is None
    assert any(line.startswith("The job did not get through: ") for line in sentences(found))


def test_codecs_and_sweeps() -> None:
    asked, slow = request(compnodes=3), load({"count": 3}, mbps=20)
    plain, packed = simulated_job(asked, slow, factors=(0.5, 1.0, 2.0)), simulated_job(asked, slow, top_k=100.0)
    assert packed.report.sent_bytes < plain.report.sent_bytes / 20
    assert packed.report.microbatches_per_s > 2 * plain.report.microbatches_per_s
    speeds = {each.factor: each.microbatches_per_s for each in plain.sweep}
    assert speeds[1.0] == plain.report.microbatches_per_s
    assert speeds[2.0] == pytest.approx(4 * speeds[0.5], rel=0.3), "links limit"
    shaky = simulated_job(asked, slow, jitter=0.3, drift=0.1, seed=3)
    assert len(set(shaky.report.step_s)) == 4


def test_power_and_rent_are_the_catalogue_s() -> None:
    rented = {"gpu": "A100 SXM 80GB", "matmul_tflops": None, "memory_gb": None, "memory_gb_per_s": None}
    bought = {**rented, "gpu": "RTX 3080"}
    machines = [{"name": "rented", **rented}, {"name": "bought", **bought}, {"name": "own"}]
    found = simulated_job(request(compnodes=3), load(*machines), rented=True, usd_per_kwh=0.2)
    by_name = {found.names[each.peer]: each for each in found.report.machines}
    rent, power_w = lookup("A100 SXM 80GB").rent_per_hour, lookup("RTX 3080").power_w
    assert rent is not None
    assert power_w is not None
    assert by_name["rented"].rent_usd == pytest.approx(rent.usd * found.report.elapsed_s / 3600)
    assert by_name["bought"].rent_usd == 0
    assert by_name["bought"].energy_j == pytest.approx(
        power_w * (by_name["bought"].busy_s + 0.3 * by_name["bought"].idle_s)
    )
    assert sorted(found.unrented) == ["bought", "own"]
    assert [found.names[each] for each in found.report.unpriced] == ["own"]
    free = simulated_job(request(compnodes=3), load(*machines))
    assert free.report.rent_usd == 0
    assert free.unrented == ()


def test_who_cannot_be_linked_is_no_backup() -> None:
    what_if = load({"name": "a", "count": 2}, {"name": "hidden", "dialable": False}, owner={"dialable": False})
    found = simulated_job(private(), what_if, steps=50, mean_up_s=2.0, mean_down_s=2.0)
    assert all(each.backup is None or found.names[each.backup] != "hidden" for each in found.report.failures)
