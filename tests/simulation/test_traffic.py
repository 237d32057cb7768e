"""Under whatever churn, nothing carries more than its rate allows: what a death cuts off counts up to the cut."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import chain, replicas, uniform

from fusionai.simulation.availability import Outage, Poisson, Scripted
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulated_recovery import Recovery, Replay, Restart
from fusionai.simulation.simulation_report import SimulationReport
from fusionai.simulation.simulator import simulate_workload
from fusionai.simulation.workload import Workload

LITTLE = 1 + 1e-9
"""Above 1 by what adding up rounds."""


def check(report: SimulationReport, links: LinkRates) -> None:
    """No link is occupied for more than the run's time, none carries more than its rate times that."""
    up_bytes, down_bytes = defaultdict[str, float](float), defaultdict[str, float](float)
    for each in report.links:
        rate = links.link(each.source, each.target).bandwidth_bytes_per_s
        assert -1e-9 <= each.busy_s <= report.elapsed_s * LITTLE
        assert -1e-9 <= each.sent_bytes <= rate * report.elapsed_s * LITTLE
        up_bytes[each.source] += each.sent_bytes
        down_bytes[each.target] += each.sent_bytes
    for found, rates in ((up_bytes, links.up_bytes_per_s), (down_bytes, links.down_bytes_per_s)):
        for peer, rate in rates.items():
            assert found[peer] <= rate * report.elapsed_s * LITTLE, peer


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pipelines=st.integers(1, 2),
    stages=st.integers(1, 4),
    boundary_bytes=st.sampled_from([0.0, 1.0, 6.0]),
    state_bytes=st.sampled_from([5, 200, 5000]),
    mean_up_s=st.sampled_from([2.0, 20.0, 200.0]),
    mean_down_s=st.sampled_from([1.0, 30.0]),
    up=st.sampled_from([1.0, 2.0, 5.0]),
    snapshot_steps=st.sampled_from([None, 1, 2]),
    restart=st.booleans(),
    ports=st.booleans(),
    owned=st.booleans(),
)
def test_nothing_carries_more_than_it_can(
    seed: int,
    pipelines: int,
    stages: int,
    boundary_bytes: float,
    state_bytes: int,
    mean_up_s: float,
    mean_down_s: float,
    up: float,
    snapshot_steps: int | None,
    restart: bool,
    ports: bool,
    owned: bool,
) -> None:
    workload = replicas(
        pipelines, stages, microbatches=3, weight_bytes=0.0, boundary_bytes=boundary_bytes, state_bytes=state_bytes
    )
    workload = replace(workload, groups=(), driver="owner" if owned else "")
    spares = {"a": 1, "b": 1, "c": 1}
    links = uniform(bytes_per_s=2.0)
    if ports:
        rates = dict.fromkeys(("owner", "", *workload.peers, *spares), up)
        # A holder takes snapshots of several machines at once, which its downlink does not slow down.
        links = replace(links, up_bytes_per_s=rates, down_bytes_per_s=rates if snapshot_steps is None else {})
    recovery: Recovery = Restart(snapshot_steps=snapshot_steps) if restart else Replay(snapshot_steps=snapshot_steps)
    churn = Poisson(seed=seed, mean_up_s=mean_up_s, mean_down_s=mean_down_s, steady=frozenset({"owner"}))
    scenario = Scenario(steps=6, churn=churn, recovery=recovery, most_failures=60)
    check(simulate_workload(workload, links, scenario, offers_bytes=spares), links)


PIPELINE = Workload((chain("m", 2, microbatches=2, boundary_bytes=1.0, state_bytes=100),), driver="owner")
"""A hundred seconds of state a stage."""


def sent_bytes(report: SimulationReport) -> dict[tuple[str, str], float]:
    return {(each.source, each.target): each.sent_bytes for each in report.links}


@pytest.mark.parametrize("shared", [False, True])
def test_a_state_that_is_cut_off_counts_as_far_as_it_came(shared: bool) -> None:
    churn = Scripted({"m1": (Outage(2.0),), "a": (Outage(13.0),)})
    links = uniform()
    if shared:
        rates = dict.fromkeys(("owner", "m0", "m1", "a", "b"), 1.0)
        links = replace(links, up_bytes_per_s=rates, down_bytes_per_s=rates)
    report = simulate_workload(PIPELINE, links, Scenario(steps=1, churn=churn), offers_bytes={"a": 1, "b": 1})
    assert report.finished
    first, second = report.failures
    assert (first.backup, first.restored_s, second.backup) == ("a", None, "b")
    # The first death is known at 3 s and a dies at 13 s; that is known at 14 s, and b gets everything.
    assert sent_bytes(report)["owner", "a"] == pytest.approx(10.0)
    assert sent_bytes(report)["owner", "b"] == pytest.approx(100.0)
    assert second.restored_s == pytest.approx(114.0)
    # Of the two activations one was on its way for a second when m1 died; b got both.
    assert sent_bytes(report)["m0", "m1"] == pytest.approx(1.0)
    assert sent_bytes(report)["m0", "b"] == pytest.approx(2.0)


def test_what_neighbours_send_again_counts_as_far_as_it_came() -> None:
    workload = Workload((chain("m", 2, microbatches=2, boundary_bytes=9.0),), driver="owner")
    one_s = simulate_workload(workload, uniform(), Scenario()).elapsed_s
    # Three past steps of two activations: 54 s. The backup is there for 20 s of them.
    died_s = 3 * one_s + 0.5
    churn = Scripted({"m1": (Outage(died_s),), "a": (Outage(died_s + 21.0),)})
    report = simulate_workload(workload, uniform(), Scenario(steps=4, churn=churn), offers_bytes={"a": 1, "b": 1})
    assert [each.replayed_steps for each in report.failures] == [3, 3]
    assert sent_bytes(report)["m0", "a"] == pytest.approx(20.0)
    assert sent_bytes(report)["m0", "b"] == pytest.approx(54.0 + 18.0)


def test_states_share_the_uplink_that_they_come_over() -> None:
    # Both stages die together; the owner's uplink carries one state after the other.
    churn = Scripted({"m0": (Outage(0.5),), "m1": (Outage(0.5),)})
    rates = {"owner": 1.0}
    links = replace(uniform(), up_bytes_per_s=rates)
    report = simulate_workload(PIPELINE, links, Scenario(steps=1, churn=churn), offers_bytes={"a": 1, "b": 1})
    assert [each.restored_s for each in report.failures] == [pytest.approx(101.5), pytest.approx(201.5)]
    alone = simulate_workload(PIPELINE, uniform(), Scenario(steps=1, churn=churn), offers_bytes={"a": 1, "b": 1})
    assert [each.restored_s for each in alone.failures] == [pytest.approx(101.5)] * 2


def test_an_upload_ends_with_its_sender() -> None:
    # The snapshot after the first step is 100 s a holder; m1 dies 10 s into it.
    one_s = simulate_workload(PIPELINE, uniform(), Scenario()).elapsed_s
    scenario = Scenario(
        steps=2, churn=Scripted({"m1": (Outage(one_s + 10.0),)}), recovery=Replay(snapshot_steps=1, holders=1)
    )
    report = simulate_workload(PIPELINE, uniform(), scenario, offers_bytes={"a": 1})
    whole = simulate_workload(PIPELINE, uniform(), replace(scenario, churn=Scripted()), offers_bytes={"a": 1})
    # Two gradients in a whole step, and at most 10 s of the next one.
    assert sent_bytes(report)["m1", "m0"] <= 2.0 + 10.0
    assert sent_bytes(whole)["m1", "m0"] <= whole.elapsed_s
