"""One step's passes: equal to the planner's reckoning, complete, and as closed formulas say."""

from __future__ import annotations

from collections import Counter

import pytest
from workloads import chain, random_case, uniform

from fusionai.scheduling.pipeline import pipeline_times
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulation_report import SimulationReport
from fusionai.simulation.simulator import simulate_workload
from fusionai.simulation.workload import EdgeLoad, PipelineLoad, Workload


def passes_end_s(report: SimulationReport) -> float:
    return max(each.end_s for each in report.timeline if each.step == 0)


@pytest.mark.parametrize("seed", range(150))
def test_equals_pipeline_times(seed: int) -> None:
    stages, edges, microbatches, workload, links = random_case(seed)
    expected = pipeline_times(stages, edges, microbatches)
    report = simulate_workload(workload, links, Scenario(timeline_steps=1))
    assert passes_end_s(report) == expected.makespan_s
    assert report.elapsed_s == expected.makespan_s
    assert {each.peer: each.busy_s for each in report.machines} == expected.busy_s
    busy_s = {(each.source, each.target): each.busy_s for each in report.links}
    assert busy_s == {link: seconds for link, seconds in expected.link_busy_s.items() if seconds}


@pytest.mark.parametrize("seed", range(20))
def test_wide_ports_change_nothing(seed: int) -> None:
    # Shared uplinks run through another path of the executor; when nothing is shared in effect, the times are equal.
    stages, edges, microbatches, workload, links = random_case(seed)
    wide = dict.fromkeys((stage.machine for stage in stages), 1e300)
    report = simulate_workload(workload, LinkRates(links.link, wide, wide), Scenario(timeline_steps=1))
    assert passes_end_s(report) == pytest.approx(pipeline_times(stages, edges, microbatches).makespan_s)


@pytest.mark.parametrize("seed", range(20))
def test_every_microbatch_exactly_once(seed: int) -> None:
    _, edges, microbatches, workload, links = random_case(seed)
    report = simulate_workload(workload, links, Scenario(steps=3, timeline_steps=3))
    count = Counter((each.step, each.stage, each.direction, each.microbatch) for each in report.timeline)
    stages = len(workload.pipelines[0].stages)
    assert len(count) == 3 * stages * 2 * microbatches
    assert set(count.values()) == {1}
    for machine in report.machines:
        assert machine.busy_s + machine.idle_s == pytest.approx(report.elapsed_s)
    machines = [stage.peer for stage in workload.pipelines[0].stages]
    per_microbatch = sum(
        edge.forward_s + (edge.backward_s or 0.0) for edge in edges if machines[edge.source] != machines[edge.target]
    )
    assert report.sent_bytes == pytest.approx(3 * microbatches * per_microbatch)
    assert sum(each.sent_bytes for each in report.links) == pytest.approx(report.sent_bytes)
    assert sum(each.received_bytes for each in report.machines) == pytest.approx(report.sent_bytes)


@pytest.mark.parametrize(("count", "microbatches"), [(1, 1), (2, 5), (4, 8), (6, 3)])
def test_equal_stages_match_the_closed_formula(count: int, microbatches: int) -> None:
    # 1F1B without links: (M + S - 1)(f + b), of which each machine is busy M (f + b).
    workload = Workload((chain("m", count, microbatches=microbatches),))
    report = simulate_workload(workload, uniform(), Scenario())
    assert report.elapsed_s == pytest.approx((microbatches + count - 1) * 3)
    for machine in report.machines:
        assert machine.bubble == pytest.approx((count - 1) / (microbatches + count - 1))


def test_a_slow_link_sets_the_pace() -> None:
    pipeline = chain("m", 2, microbatches=40, boundary_bytes=10.0, in_flight=(40, 1))
    report = simulate_workload(Workload((pipeline,)), uniform(), Scenario())
    assert 400 <= report.elapsed_s <= 440


def test_a_shared_uplink_serves_one_after_the_other() -> None:
    # One stage feeds two on other machines; each tensor alone takes a second of an uplink of one byte a second.
    stages = chain("m", 3, microbatches=1, forward_s=1.0, backward_s=1.0).stages
    pipeline = PipelineLoad(stages, (EdgeLoad(0, 1, 1.0, None), EdgeLoad(0, 2, 4.0, None)), 1)
    free = uniform()
    apart = simulate_workload(Workload((pipeline,)), free, Scenario(timeline_steps=1))
    rates = dict.fromkeys(("m0", "m1", "m2"), 1.0)
    shared = simulate_workload(Workload((pipeline,)), LinkRates(free.link, rates, rates), Scenario(timeline_steps=1))
    start = {"apart": 1 + 4.0, "shared": 1 + 1 + 4.0}
    for name, report in (("apart", apart), ("shared", shared)):
        begins = min(each.start_s for each in report.timeline if each.stage == 2)
        assert begins == pytest.approx(start[name])


def test_nothing_in_flight_is_refused() -> None:
    pipeline = chain("m", 2, microbatches=4, in_flight=(1, 0))
    with pytest.raises(ValueError, match="in flight"):
        simulate_workload(Workload((pipeline,)), uniform(), Scenario())
