"""Forecasts: single machines and better pools, and that each figure is a plan's."""

from __future__ import annotations

import itertools
import random

import pytest
from small_requests import load, private, request

from fusionai.cli.forecast_words import sentences
from fusionai.errors import ConfigError, PlacementError
from fusionai.simulation.forecast.changes import link_doubled, links_and_lines_busy_s, one_more, uplinks_doubled
from fusionai.simulation.forecast.forecast import forecast
from fusionai.simulation.forecast.request import (
    best_on,
    part_of,
    plan_at_home,
    plan_on,
    plan_with,
    searched,
    setting_of,
    with_owner,
)


def test_figures_are_those_of_plans() -> None:
    what_if = load({"count": 2, "name": "a"}, {"name": "b", "matmul_tflops": 3.0}, owner={})
    found = forecast(private(), what_if, clock_s=iter([1.0, 3.5, 4.0]).__next__)
    setting = setting_of(what_if)
    assert found.plan == plan_on(private(), setting)
    assert (found.planning_s, found.pipelines_planning_s) == (2.5, 0.5)
    assert f"(busy {found.busiest_share:.0%} of it)" in found.bottleneck
    alone = {each.machine: each for each in found.alone}
    assert alone.keys() == {"owner", "a-1", "b"}
    assert alone["a-1"].alike == 2
    assert alone["b"].predicted_step_s == plan_with(private(), what_if, 2).predicted_step_s
    assert what_if.owner is not None
    assert alone["owner"].predicted_step_s == plan_at_home(private(), what_if.owner).predicted_step_s
    assert [each.speedup for each in found.alone] == sorted((each.speedup or 0 for each in found.alone), reverse=True)
    larger = plan_on(private(), setting_of(one_more(what_if, 2))).predicted_step_s
    assert found.what_if["one_more_machine"].predicted_step_s == min(larger, found.predicted_step_s)
    assert "one more machine like b (" in found.what_if["one_more_machine"].what
    assert found.tokens_per_s == pytest.approx(1024 / found.predicted_step_s)


def test_the_whole_search_for_one_machine_is_the_short_one() -> None:
    what_if = load({"name": "only"}, owner={})
    setting = setting_of(what_if)
    for asked in (request(), private()):
        assert plan_with(asked, what_if, 0).stages == plan_on(asked, setting).stages


def test_an_open_job_is_driven_without_cost() -> None:
    what_if = load({"count": 3, "name": "a"}, mbps=100)
    full = with_owner(what_if, "open")
    assert full.owner is not None
    found = forecast(request(compnodes=3), what_if)
    assert full.owner.peer not in {stage.peer for stage in found.plan.stages}
    assert {each.machine for each in found.alone} == {"a-1"}
    assert all(full.owner.name not in each.machines for each in found.assumed)
    with pytest.raises(ConfigError, match=r"no \[owner\] table"):
        with_owner(what_if, "private")
    assert with_owner(load({}, owner={}), "private").owner is not None


def test_an_owner_in_the_file_is_tried_alone_in_open_jobs_too() -> None:
    found = forecast(request(), load({}, owner={"matmul_tflops": 50.0, "memory_gb_per_s": 5000}))
    assert found.alone[0].machine == "owner"
    assert found.alone[0].speedup is not None
    assert found.alone[0].speedup > 1


def test_better_pools() -> None:
    what_if = load({"count": 3, "name": "a", "up_mbps": 40}, mbps=200)
    full = with_owner(what_if, "open")
    doubled = uplinks_doubled(full)
    assert doubled.link(0, 1).bandwidth_bytes_per_s == 2 * full.link(0, 1).bandwidth_bytes_per_s
    assert uplinks_doubled(uplinks_doubled(uplinks_doubled(full))).link(0, 1).bandwidth_bytes_per_s == 25e6

    larger = one_more(full, 1)
    assert larger.members[3].name == "another a-2"
    assert larger.owner == full.owner
    assert larger.link(3, 0) == full.link(1, 0)
    assert larger.link(4, 3) == full.link(3, 1), "the owner stays last"

    setting = setting_of(full)
    plan = plan_on(request(compnodes=3), setting)
    busy_s, _ = links_and_lines_busy_s(request(), plan, setting)
    link = max(busy_s, key=lambda link: busy_s[link])
    assert len(busy_s) == 4, "two cuts, both ways"
    faster = link_doubled(setting, *link)
    for one, other in (link, link[::-1]):
        before, after = setting.pool.link(one, other), faster.pool.link(one, other)
        assert after.bandwidth_bytes_per_s == 2 * before.bandwidth_bytes_per_s
        assert after.rtt_s == before.rtt_s
    assert sum(faster.pool.links[key] != each for key, each in setting.pool.links.items()) == 2


def test_a_plan_on_one_machine_has_no_link() -> None:
    found = forecast(request(), load({"count": 2}, mbps=1))
    assert len(found.plan.stages) == 1
    assert "bottleneck_link_doubled" not in found.what_if
    assert all(change.speedup >= 1 for change in found.what_if.values())


def test_a_job_that_counts_its_machines_takes_the_new_one() -> None:
    found = forecast(request(compnodes=2), load({"count": 2}, mbps=1e6, links={"rtt_ms": 0}))
    assert found.what_if["one_more_machine"].speedup > 1.1
    assert 0.3 < found.bound_share <= 1


def test_pipelines_are_those_of_the_planner() -> None:
    what_if = load({"count": 12, "name": "a"}, {"name": "slow", "matmul_tflops": 0.2}, links={"rtt_ms": 0.1})
    found = forecast(request(microbatches=64), what_if, what_ifs=False)
    planned = best_on(request(microbatches=64), with_owner(what_if, "open"))
    assert found.pipelines_step_s == planned.predicted_step_s < found.predicted_step_s
    assert [each.microbatches for each in found.pipelines] == [each.microbatches for each in planned.pipelines]
    assert sum(each.microbatches for each in found.pipelines) == 64
    names = {each.peer: each.name for each in what_if.members}
    for row, pipeline in zip(found.pipelines, planned.pipelines, strict=True):
        assert [each.machine for each in row.stages] == [names[each.peer] for each in pipeline.stages]
        seconds = sum(each.predicted.forward_s + each.predicted.backward_s for each in pipeline.stages)
        assert sum(each.seconds for each in row.stages) == pytest.approx(seconds)
        assert all(0 < each.busy <= 1 for each in row.stages)
    (line,) = (each for each in sentences(found) if each.startswith(f"With {len(planned.pipelines)} pipelines"))
    assert "Training runs one pipeline today" in line


def test_a_job_that_says_how_it_is_cut_has_one_pipeline() -> None:
    found = forecast(request(compnodes=2), load({"count": 4}), what_ifs=False)
    assert found.pipelines == ()
    assert found.pipelines_step_s is None
    assert not any("pipelines" in each for each in sentences(found))


def test_a_part_of_a_pool_has_its_links() -> None:
    tables = {"regions": [{"name": "x"}, {"name": "y"}], "routes": [{"between": ["x", "y"], "mbps": 5, "rtt_ms": 40}]}
    machines = [{"name": f"m{k}", "region": "xy"[k % 2], "up_mbps": 10.0 * (k + 1)} for k in range(5)]
    what_if = load(*machines, owner={"region": "y", "up_mbps": 3}, **tables)
    part = part_of(what_if, (1, 4))
    assert [each.name for each in part.machines] == ["m1", "m4", "owner"]
    kept = (1, 4, 5)
    for here, there in itertools.permutations(range(3), 2):
        assert part.link(here, there) == what_if.link(kept[here], kept[there])


@pytest.mark.parametrize("seed", range(6))
def test_seeking_among_the_best_chains_costs_little(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    machines = [
        {
            "name": f"m{k}",
            "matmul_tflops": draw.choice((0.3, 1.0, 3.0)),
            "memory_gb": draw.choice((0.1, 0.3)),
            "up_mbps": draw.choice((50, 1000, 10_000)),
        }
        for k in range(9)
    ]
    what_if = load(*machines, owner={})
    asked = private() if seed % 2 else request()
    whole = plan_on(asked, setting_of(what_if))
    assert searched(asked, what_if) is what_if
    monkeypatch.setattr("fusionai.simulation.forecast.request.MOST_SEARCHED", 5)
    part = searched(asked, what_if)
    assert len(part.members) <= 5
    assert plan_on(asked, setting_of(part)).predicted_step_s <= whole.predicted_step_s * 1.15


def test_large_pools_say_among_whom_was_sought() -> None:
    what_if = load({"count": 90, "name": "slow", "matmul_tflops": 0.1}, {"count": 2, "name": "fast"})
    found = forecast(request(), what_if)
    assert found.considered < found.offered == 92
    assert {each.machine for each in found.stages} <= {"fast-1", "fast-2"}
    assert any(f"among the {found.considered} machines" in each for each in sentences(found))
    (left_out,) = (each for each in sentences(found) if each.startswith("Left out: "))
    assert left_out.startswith(
        f"Left out: {92 - len(found.stages)} of 92 machines: {92 - found.considered} that were not searched"
    )
    assert {each.machine for each in found.alone} == {"fast-1", "slow-1"}
    # Numbers of machines that the best chains do not have are still obeyed.
    assert len(forecast(request(compnodes=4), what_if, what_ifs=False).stages) == 4


def test_a_pool_file_without_room_says_what_to_change_in_it() -> None:
    said = r"offers 1 MB, and .* are missing; add compnodes, one with .* raise their `memory` in the pool file"
    for count in (3, 80):
        what_if = load({"count": count, "memory_gb": 0.001, "name": "m"})
        with pytest.raises(PlacementError, match=said):
            forecast(request(), what_if)
