"""Deaths, backups and restarts: every step is done in the end, and recovery takes what can be reckoned by hand."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import chain, replicas, uniform

from fusionai.simulation.availability import Outage, Poisson, Scripted
from fusionai.simulation.jitter import Jitter
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulated_recovery import Replay, Restart
from fusionai.simulation.simulator import simulate_workload
from fusionai.simulation.workload import Workload

STEP_S = (4 + 3 - 1) * 3.0
"""Of `PIPELINE` on links that take no time."""
PIPELINE = Workload((chain("m", 3, microbatches=4, state_bytes=10),), driver="owner")
FREE = uniform(bytes_per_s=1e9)


def died(peer: str, *outages: Outage) -> Scripted:
    return Scripted({peer: outages})


def test_a_backup_replays_and_nobody_rolls_back() -> None:
    # No snapshot: the backup gets the initial state and computes two finished steps again, then the third up to where
    # the dead machine was. m1 has 3 s of passes in each microbatch, and dies in step 2 after 9 s.
    links = uniform(bytes_per_s=5.0)
    scenario = Scenario(
        steps=6, churn=died("m1", Outage(2 * STEP_S + 9.0)), recovery=Replay(detection_s=0.5), timeline_steps=6
    )
    report = simulate_workload(PIPELINE, links, scenario, offers_bytes={"spare": 1})
    (failure,) = report.failures
    assert report.finished
    assert failure.backup == "spare"
    assert failure.replayed_steps == 2
    # Detection, 10 bytes of state at 5 bytes/s, two steps of four microbatches.
    assert failure.restored_s == pytest.approx(failure.died_s + 0.5 + 2.0)
    assert report.step_s[:2] == (STEP_S, STEP_S)
    before = [each for each in report.timeline if each.peer == "m1" and each.step == 2 and not each.lost]
    caught_up_s = sum(each.end_s - each.start_s for each in before)
    after = [each for each in report.timeline if each.peer == "spare" and each.step == 2]
    again = [each for each in after if each.again]
    assert {(each.direction, each.microbatch) for each in again} == {(e.direction, e.microbatch) for e in before}
    # A backward whose gradients had come before the death goes before forwards that are computed again.
    between = [each for each in after if not each.again and each.end_s < max(each.end_s for each in again)]
    between_s = sum(each.end_s - each.start_s for each in between)
    assert failure.recovery_s == pytest.approx(0.5 + 2.0 + 2 * 4 * 3.0 + caught_up_s + between_s)
    # The survivors computed everything once: nobody rolled back.
    assert {each.peer: each.busy_s for each in report.machines if each.peer in {"m0", "m2"}} == {
        "m0": pytest.approx(6 * 4 * 3),
        "m2": pytest.approx(6 * 4 * 3),
    }
    assert report.recomputed_s == pytest.approx(2 * 4 * 3.0 + caught_up_s)
    done = [each for each in report.timeline if not each.again and not each.lost]
    assert len(done) == 6 * 3 * 4 * 2
    assert report.step_s[3:] == pytest.approx((STEP_S,) * 3)


def test_a_restart_costs_more_than_replay() -> None:
    churn = died("m1", Outage(5 * STEP_S + 9.0))
    common = {"detection_s": 0.5, "snapshot_steps": 2}
    replay = simulate_workload(
        PIPELINE, FREE, Scenario(steps=8, churn=churn, recovery=Replay(**common)), offers_bytes={"spare": 1}
    )
    restart = simulate_workload(
        PIPELINE, FREE, Scenario(steps=8, churn=churn, recovery=Restart(**common, restart_s=0.0)),
        offers_bytes={"spare": 1},
    )  # fmt: skip
    assert replay.finished
    assert restart.finished
    assert replay.elapsed_s < restart.elapsed_s
    assert replay.lost_s < restart.lost_s
    assert replay.failures[0].replayed_steps == restart.failures[0].replayed_steps == 1
    # Restart: detection, then the step since the checkpoint and what the interrupted one had done, once more.
    assert restart.elapsed_s == pytest.approx(8 * STEP_S + 0.5 + STEP_S + 9.0, abs=1e-6)
    assert restart.failures[0].recovery_s == pytest.approx(0.5 + STEP_S, abs=1e-6)


def test_replicas_of_other_pipelines_give_the_state() -> None:
    workload = replicas(2, 3, microbatches=4, weight_bytes=10.0, state_bytes=30)
    links = uniform(bytes_per_s=10.0)
    length_s = simulate_workload(workload, links, Scenario()).elapsed_s
    scenario = Scenario(steps=5, churn=died("p0-1", Outage(3 * length_s + 5.0)), recovery=Replay(detection_s=1.0))
    report = simulate_workload(workload, links, scenario, offers_bytes={"spare": 1})
    (failure,) = report.failures
    assert failure.state_from == "replicas on p1-1"
    assert failure.replayed_steps == 0
    # Three copies (weight and two states) of 10 bytes at 10 bytes/s.
    assert failure.restored_s == pytest.approx(failure.died_s + 1.0 + 3.0)
    assert report.finished


def test_a_snapshot_shortens_replay_and_uploads_take_their_share_of_links() -> None:
    workload = Workload((chain("m", 3, microbatches=4, state_bytes=20, boundary_bytes=1.0),), driver="owner")
    links = uniform(bytes_per_s=10.0)
    plain = simulate_workload(workload, links, Scenario(steps=6))
    taken = simulate_workload(workload, links, Scenario(steps=6, recovery=Replay(snapshot_steps=2)))
    assert (taken.snapshots, taken.snapshots_skipped) == (2, 0)
    assert taken.sent_bytes - plain.sent_bytes == pytest.approx(2 * 3 * 2 * 20)
    assert plain.elapsed_s < taken.elapsed_s < 1.2 * plain.elapsed_s
    died_s = sum(taken.step_s[:5]) + 5.0
    report = simulate_workload(
        workload,
        links,
        Scenario(steps=6, recovery=Replay(snapshot_steps=2), churn=died("m1", Outage(died_s))),
        offers_bytes={"spare": 1},
    )
    (failure,) = report.failures
    assert failure.replayed_steps == 1
    assert failure.state_from == "the snapshot after step 4 on m2"
    assert report.finished


def test_snapshots_that_are_too_slow_are_skipped() -> None:
    workload = Workload((chain("m", 2, microbatches=2, state_bytes=100),), driver="owner")
    report = simulate_workload(workload, uniform(), Scenario(steps=6, recovery=Replay(snapshot_steps=1, holders=1)))
    assert report.snapshots == 1
    assert report.snapshots_skipped == 4


def test_without_a_backup_the_job_waits() -> None:
    scenario = Scenario(steps=3, churn=died("m1", Outage(5.0, 500.0)))
    report = simulate_workload(PIPELINE, FREE, scenario)
    assert report.finished
    assert report.failures[0].backup == "m1"
    assert report.elapsed_s > 500
    for machine in report.machines:
        assert machine.busy_s + machine.idle_s + machine.absent_s == pytest.approx(report.elapsed_s)
    gone = simulate_workload(PIPELINE, FREE, Scenario(steps=3, churn=died("m1", Outage(5.0))))
    assert not gone.finished
    assert gone.steps == 0
    assert "no machine" in gone.ended_because


def test_an_absence_is_no_bubble() -> None:
    # m1 is gone for nearly all of the run; while it is there it idles as it does without deaths, and a second or two.
    still = simulate_workload(PIPELINE, FREE, Scenario(steps=3))
    bubble = {each.peer: each.bubble for each in still.machines}
    assert bubble["m1"] == pytest.approx(1 - 12.0 / STEP_S)
    report = simulate_workload(PIPELINE, FREE, Scenario(steps=3, churn=died("m1", Outage(5.0, 5005.0))))
    (m1,) = (each for each in report.machines if each.peer == "m1")
    assert m1.absent_s == pytest.approx(5000.0)
    there_s = report.elapsed_s - m1.absent_s
    assert there_s < 5 * STEP_S
    # Its steps are passes alone, so it idles in no other time.
    assert m1.bubble == pytest.approx(m1.idle_s / there_s)
    assert m1.bubble == pytest.approx(1 - m1.busy_s / there_s) != pytest.approx(1.0, abs=0.2)


def test_a_spare_that_comes_later_and_one_too_small() -> None:
    churn = Scripted({"m1": (Outage(5.0),), "late": (Outage(0.0, 40.0),)})
    report = simulate_workload(
        PIPELINE, FREE, Scenario(steps=2, churn=churn), offers_bytes={"small": 0, "late": 1}
    )  # fmt: skip
    assert report.failures[0].backup == "late"
    assert report.failures[0].restored_s == pytest.approx(40.0, abs=1e-6)


def test_the_backup_dies_too() -> None:
    churn = Scripted({"m1": (Outage(5.0),), "a": (Outage(7.0),)})
    report = simulate_workload(PIPELINE, FREE, Scenario(steps=2, churn=churn), offers_bytes={"a": 1, "b": 1})
    assert [(each.peer, each.backup) for each in report.failures] == [("m1", "a"), ("a", "b")]
    assert report.finished


def test_a_death_while_the_step_commits() -> None:
    workload = Workload((chain("m", 2, microbatches=2, update_s=5.0),), driver="owner")
    length_s = simulate_workload(workload, FREE, Scenario()).elapsed_s
    scenario = Scenario(steps=2, churn=died("m1", Outage(length_s - 1.0)), timeline_steps=2)
    report = simulate_workload(workload, FREE, scenario, offers_bytes={"spare": 1})
    assert report.finished
    assert sum(each.again for each in report.timeline) == 4
    assert report.elapsed_s > 2 * length_s


def test_the_driver_cannot_be_replaced() -> None:
    workload = Workload((chain("m", 2, microbatches=2),), driver="m0")
    report = simulate_workload(workload, FREE, Scenario(steps=2, churn=died("m0", Outage(1.0))))
    assert "driver" in report.ended_because


def test_the_same_seed_gives_the_same_report() -> None:
    def run(seed: int) -> bytes:
        scenario = Scenario(
            steps=12,
            churn=Poisson(seed=seed, mean_up_s=150.0, mean_down_s=40.0),
            jitter=Jitter(seed=seed, spread=0.1, drift=0.1),
            recovery=Replay(snapshot_steps=3),
        )
        return msgspec.json.encode(simulate_workload(PIPELINE, FREE, scenario, offers_bytes={"a": 1, "b": 1}))

    assert run(1) == run(1)
    assert run(1) != run(2)


@settings(max_examples=60, deadline=None)
@given(
    deaths=st.dictionaries(st.sampled_from(["m0", "m1", "m2", "a", "b"]), st.floats(0.0, 150.0), max_size=4),
    boundary_bytes=st.sampled_from([0.0, 0.5, 3.0]),
    snapshot_steps=st.sampled_from([None, 1, 2]),
    shared=st.booleans(),
)
def test_whoever_dies_every_pass_counts_once(
    deaths: dict[str, float], boundary_bytes: float, snapshot_steps: int | None, shared: bool
) -> None:
    pipeline = chain("m", 3, microbatches=4, state_bytes=5, boundary_bytes=boundary_bytes)
    links = uniform(rtt_s=0.1)
    if shared:
        ports = dict.fromkeys(["m0", "m1", "m2", "a", "b"], 1.0)
        links = type(links)(links.link, ports, ports)
    scenario = Scenario(
        steps=5,
        churn=Scripted({peer: (Outage(at_s, at_s + 60.0),) for peer, at_s in deaths.items()}),
        recovery=Replay(snapshot_steps=snapshot_steps),
        timeline_steps=5,
    )
    report = simulate_workload(Workload((pipeline,), driver="owner"), links, scenario, offers_bytes={"a": 1, "b": 1})
    assert report.finished
    counted = {
        (each.step, each.stage, each.direction, each.microbatch)
        for each in report.timeline
        if not each.lost and not each.again
    }
    assert len(counted) == 5 * 3 * 4 * 2
    assert len([each for each in report.timeline if not each.lost and not each.again]) == len(counted)
    # Nothing starts before what it needs has ended somewhere.
    first_end: dict[tuple[int, int, str, int], float] = {}
    for each in report.timeline:
        key = each.step, each.stage, each.direction, each.microbatch
        if not each.lost:
            first_end[key] = min(first_end.get(key, each.end_s), each.end_s)
    for each in report.timeline:
        if each.direction == "forward" and each.stage > 0:
            assert each.start_s >= first_end[each.step, each.stage - 1, "forward", each.microbatch]
        if each.direction == "backward" and each.stage < 2:
            assert each.start_s >= first_end[each.step, each.stage + 1, "backward", each.microbatch]
    fault_free = simulate_workload(Workload((pipeline,), driver="owner"), links, Scenario(steps=5))
    assert report.elapsed_s >= fault_free.elapsed_s - 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), restart=st.booleans())
def test_churn_never_loses_a_step(seed: int, restart: bool) -> None:
    recovery = Restart(snapshot_steps=2) if restart else Replay(snapshot_steps=2)
    scenario = Scenario(
        steps=10, churn=Poisson(seed=seed, mean_up_s=400.0, mean_down_s=50.0), recovery=recovery, timeline_steps=2
    )
    report = simulate_workload(PIPELINE, FREE, scenario, offers_bytes={"a": 1, "b": 1})
    assert report.finished
    assert len(report.step_s) >= 10
    for failure in report.failures:
        assert failure.recovery_s is None or failure.recovery_s >= 1.0
    for machine in report.machines:
        assert 0 <= machine.busy_s <= report.elapsed_s


def test_a_job_that_never_catches_up_is_given_up() -> None:
    churn = Poisson(seed=0, mean_up_s=5.0, mean_down_s=1.0)
    report = simulate_workload(PIPELINE, FREE, Scenario(steps=50, churn=churn, most_failures=40))
    assert not report.finished
    assert "most_failures" in report.ended_because
    assert len(report.failures) == 40
