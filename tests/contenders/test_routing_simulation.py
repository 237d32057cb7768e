"""Routed stages simulated: against hand-worked figures, the pipeline's schedule, and whoever dies."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from decoder_graph import GB, decoder, member
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replicated_tasks import task
from routed_jobs import one_each, routed
from workloads import random_case

from contenders.replicated.replicated_planner import best_stages
from contenders.routed_simulation.recovery_rules import AGORA, FUSION, SWARM, RecoveryRules
from contenders.routed_simulation.routing_report import RoutingReport
from contenders.routed_simulation.routing_simulator import RoutingScenario, links_of_job, simulate_routing
from contenders.routers.balanced import BalancedMembership
from contenders.routers.ema_heap import EmaHeap
from contenders.routers.expected_finish import ExpectedFinish
from contenders.routers.membership import Membership, SwarmMembership
from contenders.routers.route_policy import RoutePolicy
from contenders.routers.routed_job import RoutedJob, SharedWeights, StageMemory
from contenders.routers.step_estimate import step_estimate
from fusionai.errors import ConfigError
from fusionai.scheduling.pipeline import Edge, StageTimes, pipeline_times
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.simulation.availability import Churn, Outage, Poisson, Scripted
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulator import simulate_workload

Holders = list[list[int]]
RULES = (FUSION, SWARM, AGORA, replace(SWARM, counted="forgotten"), replace(FUSION, roll_back="always"))


def run(
    job: RoutedJob,
    holders: Holders,
    *,
    policy: RoutePolicy | None = None,
    membership: Membership | None = None,
    links: LinkRates | None = None,
    **options: object,
) -> RoutingReport:
    scenario = RoutingScenario(**({"steps": 1} | options))  # type: ignore[arg-type]
    return simulate_routing(
        job, holders, policy or ExpectedFinish(job), membership or BalancedMembership(job), scenario, links=links
    )


def died(*deaths: tuple[str, float]) -> Scripted:
    return Scripted({peer: (Outage(at_s),) for peer, at_s in deaths})


def test_a_pipeline_takes_its_closed_form() -> None:
    # GPipe's and 1F1B's: (M + K - 1) (f + b), transfers none.
    for microbatches, stages in ((1, 1), (4, 3), (8, 4)):
        held = np.broadcast_to(np.arange(stages, 0, -1)[:, None], (stages, stages))
        job = replace(routed(stages, stages, microbatches=microbatches), in_flight=held.copy())
        report = run(job, [[each] for each in range(stages)])
        assert report.elapsed_s == pytest.approx((microbatches + stages - 1) * 3.0)


@pytest.mark.parametrize("make", [EmaHeap, None])
def test_two_equal_holders_halve_a_single_stage(make: type[EmaHeap] | None) -> None:
    job = routed(2, 1, microbatches=8)
    assert run(job, [[0, 1]], policy=make() if make else None).elapsed_s == pytest.approx(4 * 3.0)


def test_holders_share_by_speed() -> None:
    # One takes 3 s a microbatch, the other 1 s: of 8 they get 2 and 6.
    job = routed(2, 1, microbatches=8, speeds=[1.0, 3.0], in_flight=4)
    assert run(job, [[0, 1]]).elapsed_s == pytest.approx(6.0)


def in_order(case: tuple[list[StageTimes], list[Edge], int]) -> bool:
    """Whether every machine has one stage, and stages feed the next only."""
    stages, edges, _ = case
    return len({each.machine for each in stages}) == len(stages) and all(e.target == e.source + 1 for e in edges)


def test_one_holder_each_takes_what_the_simulator_says() -> None:
    compared = 0
    for seed in range(300):
        stages, edges, microbatches, workload, links = random_case(seed)
        if not in_order((stages, edges, microbatches)):
            continue
        job = one_each(stages, edges, microbatches)
        report = run(job, [[each] for each in range(len(stages))], record_steps=1)
        compared += 1
        expected = pipeline_times(stages, edges, microbatches).makespan_s
        assert report.passes_s[0] == pytest.approx(expected, rel=1e-12)
        theirs = simulate_workload(workload, links, Scenario(timeline_steps=1))
        place = {each.machine: f"m{number}" for number, each in enumerate(stages)}
        starts = {
            (place[each.peer], each.direction == "backward", each.microbatch): each.start_s for each in theirs.timeline
        }
        assert len(report.passes) == len(starts)
        for each in report.passes:
            assert each.start_s == pytest.approx(starts[each.peer, each.backward, each.microbatch])
    assert compared > 100


def test_sums_take_a_ring_all_reduce() -> None:
    job = routed(3, 1, microbatches=3, weight_bytes=60.0, bytes_per_s=10.0, delay_s=0.1)
    report = run(job, [[0, 1, 2]])
    assert report.elapsed_s == pytest.approx(3.0 + 4 * (20.0 / 10.0 + 0.1))
    assert report.passes_s[0] == pytest.approx(report.elapsed_s)


def test_links_carry_one_tensor_after_the_other() -> None:
    # Two stages, the link takes 4 s: 1, then a tensor every 4 s; the last comes back 4 s after its backward.
    job = routed(2, 2, microbatches=3, boundary_bytes=4.0, in_flight=8)
    assert run(job, [[0], [1]]).elapsed_s == pytest.approx(1 + 3 * 4 + 3 + 4 + 2)


def test_a_shared_uplink_is_slower() -> None:
    job = routed(3, 2, microbatches=6, boundary_bytes=4.0, in_flight=8)
    ports = dict.fromkeys(job.peers, 1.0)
    shared = LinkRates(links_of_job(job).link, ports, ports)
    assert run(job, [[0], [1, 2]], links=shared).elapsed_s > run(job, [[0], [1, 2]]).elapsed_s


def test_memory_bounds_what_is_in_flight() -> None:
    # One at a time goes there and back: forward, link, forward and backward, link, backward.
    job = routed(2, 2, microbatches=3, boundary_bytes=4.0, in_flight=1)
    assert run(job, [[0], [1]]).elapsed_s == pytest.approx(3 * (1 + 4 + 3 + 4 + 2))


def test_a_death_costs_detection_and_what_was_lost() -> None:
    # Two machines with two microbatches each, 3 s a piece. Machine 1 dies at 4 s; at 5 s its two are given to
    # machine 0, which has one second left of its own, and does four more passes of them.
    job = routed(2, 1, microbatches=4, in_flight=4)
    report = run(job, [[0, 1]], churn=died(("m1", 4.0)))
    assert report.finished
    assert (report.deaths, report.lost_cells) == (1, 2)
    assert report.elapsed_s == pytest.approx(4 * 3.0)
    assert report.recomputed_s == pytest.approx(3.0 + 1.0)


def test_survivors_do_not_compute_what_they_have_computed() -> None:
    # The middle stage's second holder dies with gradients added up; the stages around it compute nothing twice.
    job = routed(4, 3, microbatches=6, boundary_bytes=0.5, in_flight=6)
    calm = run(job, [[0], [1, 3], [2]])
    report = run(job, [[0], [1, 3], [2]], churn=died(("m3", 14.0)))
    assert report.finished
    assert report.lost_cells > 0
    for peer in ("m0", "m2"):
        assert report.busy_s[peer] == pytest.approx(calm.busy_s[peer])


def test_whole_microbatches_cost_everybody() -> None:
    job = routed(4, 3, microbatches=6, boundary_bytes=0.5, in_flight=6)
    report = run(
        job,
        [[0], [1, 3], [2]],
        churn=died(("m3", 14.0)),
        rules=replace(FUSION, held="microbatch", counted="microbatch"),
    )
    calm = run(job, [[0], [1, 3], [2]])
    assert report.finished
    assert report.busy_s["m0"] > calm.busy_s["m0"]


def test_a_spare_takes_over_with_state_from_a_holder() -> None:
    job = routed(3, 1, microbatches=2, state_bytes=7.0, weight_bytes=1.0)
    report = run(job, [[0, 1]], churn=died(("m1", 1.0)), steps=6)
    assert report.finished
    assert report.joined == 1
    # Known at 2 s, loaded 7 s later; then two machines share the work again.
    assert report.step_s[-1] == pytest.approx(report.step_s[0], abs=4.0)
    assert "m2" in report.busy_s


def test_a_stage_that_everybody_left_comes_from_a_snapshot() -> None:
    # A second holder would cost a sum of 50 s, so machine 2 waits in the pool. A step takes 9 s.
    job = routed(3, 2, microbatches=2, state_bytes=4.0, weight_bytes=50.0)
    report = run(job, [[0], [1]], churn=died(("m1", 20.0)), steps=5)
    assert report.finished
    assert (report.joined, report.rolled_back) == (1, 0)
    # Known at 21 s; 4 s for the state and two steps of two microbatches at 3 s, then the present step's passes: the
    # last stage's first forward had been at 19 s, so its 6 s come again before the other's last backward.
    assert report.step_s[2] == pytest.approx(21.0 + 4.0 + 12.0 + 6.0 + 2.0 - 18.0)
    assert report.step_s[4] == pytest.approx(9.0)
    back = run(job, [[0], [1]], churn=died(("m1", 20.0)), steps=5, rules=replace(FUSION, roll_back="always"))
    assert back.finished
    assert back.rolled_back == 2
    assert len(back.step_s) == 5 + 2


def test_without_a_pool_the_job_waits_or_ends() -> None:
    job = routed(2, 2, microbatches=2, state_bytes=4.0)
    waits = run(job, [[0], [1]], churn=Scripted({"m1": (Outage(3.0, 100.0),)}), steps=2)
    assert waits.finished
    assert waits.elapsed_s > 104.0
    ends = run(job, [[0], [1]], churn=died(("m1", 3.0)), steps=2)
    assert not ends.finished
    assert "stage 1 has had no holder" in ends.ended_because
    assert "ever comes" in ends.ended_because


def test_the_driver_cannot_be_replaced() -> None:
    job = routed(3, 2, microbatches=2, driver=0)
    report = run(job, [[0], [1]], churn=died(("m0", 3.0)))
    assert "driver" in report.ended_because


@pytest.mark.parametrize("at_s", [0.0, 0.5, 1.0, 5.9, 6.0, 6.5, 9.0, 12.0, 13.0, 15.9, 16.0, 20.0, 25.9, 30.0])
def test_deaths_at_awkward_moments(at_s: float) -> None:
    """Before anything, while a tensor travels, at a pass's very end, in the sum, and in the commit."""
    job = routed(5, 2, microbatches=4, boundary_bytes=1.5, state_bytes=3.0, weight_bytes=4.0, delay_s=0.1)
    for rules in RULES:
        report = run(job, [[0, 1], [2, 3]], churn=died(("m1", at_s), ("m3", at_s)), rules=rules, steps=2)
        assert report.finished, report.ended_because
        assert report.deaths == 2


def test_a_dead_holder_is_found_out_by_waiting() -> None:
    job = routed(2, 1, microbatches=2, in_flight=4)
    quick = run(job, [[0, 1]], policy=EmaHeap(), churn=died(("m1", 0.5)))
    slow = run(job, [[0, 1]], policy=EmaHeap(), churn=died(("m1", 0.5)), rules=SWARM)
    # The lost microbatch follows the other on machine 0; by waiting, it is given up after 5 s only.
    assert quick.elapsed_s == pytest.approx(6.0)
    assert slow.elapsed_s == pytest.approx(5.0 + 3.0)


def test_the_same_seed_gives_the_same_report() -> None:
    def once(seed: int) -> RoutingReport:
        job = routed(6, 3, microbatches=5, boundary_bytes=0.5, state_bytes=3.0, weight_bytes=2.0)
        churn = Poisson(seed=seed, mean_up_s=300.0, mean_down_s=20.0)
        return run(job, [[0, 3], [1, 4], [2]], churn=churn, steps=8)

    assert once(1) == once(1)
    assert once(1) != once(2)


def memory_for_two(machines: int, stages: int, room: int) -> StageMemory:
    """Return memory in which two stages have room for `room` microbatches each, and three for none."""
    return StageMemory(np.full((stages, machines), 5.0), np.ones(stages), np.full(machines, 10.0 + 2 * room))


def test_a_survivor_holds_two_stages() -> None:
    # Nobody is spare. Known at 4 s, the state is there at 6 s, a step's snapshot with it: nothing is rolled back.
    job = replace(routed(2, 2, microbatches=4, state_bytes=2.0), memory=memory_for_two(2, 2, 4))
    report = run(job, [[0], [1]], churn=died(("m1", 3.0)), steps=3)
    assert report.finished
    # One machine: 4 microbatches at 3 s on each of two stages.
    assert report.step_s[1:] == pytest.approx((24.0, 24.0))
    assert report.busy_s["m0"] == pytest.approx(3 * 24.0)


def test_taking_a_stage_more_gives_up_what_there_is_no_room_for() -> None:
    # Machine 0 holds four microbatches when machine 1 dies; with both stages there is room for one of each.
    job = replace(routed(2, 2, microbatches=4, state_bytes=2.0), memory=memory_for_two(2, 2, 1))
    report = run(job, [[0], [1]], churn=died(("m1", 4.5)), steps=2, record_steps=1)
    assert report.finished
    again = [each.microbatch for each in report.passes if each.peer == "m0" and each.stage == 0 and not each.backward]
    # One of the four stays, the others' forwards come again.
    assert sorted(again) == [0, 1, 1, 2, 2, 3, 3]
    held = 0
    for each in sorted(report.passes, key=lambda one: one.end_s):
        if each.stage == 0 and each.start_s > 7.5:
            held += -1 if each.backward else 1
            assert held <= 1


def test_who_held_two_stages_is_relieved() -> None:
    job = replace(routed(2, 2, microbatches=4, state_bytes=2.0), memory=memory_for_two(2, 2, 4))
    report = run(job, [[0], [1]], churn=Scripted({"m1": (Outage(3.0, 40.0),)}), steps=6)
    assert report.finished
    assert report.step_s[-1] == pytest.approx(report.step_s[-2])
    assert report.step_s[-1] == pytest.approx((4 + 1) * 3.0)


def test_who_is_far_is_relieved_in_the_middle_of_a_step() -> None:
    # Machine 2 comes back at 30 s, when machine 1 is about to get 20 microbatches, each after 100 s on its link.
    job = routed(3, 2, microbatches=20, boundary_bytes=0.01, state_bytes=4.0, in_flight=20)
    far = np.array(job.bandwidth)
    far[1, [0, 2]] = far[[0, 2], 1] = 1e-4
    job = replace(job, bandwidth=far)
    alone = run(job, [[0], [1]], steps=1)
    report = run(job, [[0], [1]], churn=Scripted({"m2": (Outage(0.0, 30.0),)}), steps=2)
    assert report.finished
    assert alone.elapsed_s > 2000.0
    # Loaded at 34 s; then its 20 microbatches of 3 s, one after the other, and the last one's way home.
    assert 34.0 + 20 * 3.0 < report.step_s[0] < 34.0 + 20 * 3.0 + 6.0
    assert report.step_s[1] == pytest.approx(21 * 3.0, abs=0.2)


def test_a_state_comes_from_a_snapshot_where_the_holder_is_far() -> None:
    # Machine 1 is far from all others. After the first step 2 begins to load, and takes its place after the second.
    job = routed(4, 2, microbatches=2, boundary_bytes=0.01, state_bytes=4.0)
    far = np.array(job.bandwidth)
    far[1, [0, 2, 3]] = far[[0, 2, 3], 1] = 1e-3
    job = replace(job, bandwidth=far)
    report = run(job, [[0], [1]], steps=5)
    # 4,000 s from the holder; 4 s from a snapshot, and nothing since it.
    assert report.step_s[2:] == pytest.approx((9.02, 9.02, 9.02), abs=0.1)
    slow = run(job, [[0], [1]], steps=5, rules=replace(FUSION, roll_back="always"))
    assert min(slow.step_s) > 3 * report.step_s[2]


CHURNS = st.one_of(
    st.dictionaries(
        st.sampled_from([f"m{each}" for each in range(7)]),
        st.tuples(st.floats(0.0, 80.0), st.floats(0.5, 40.0)),
        max_size=5,
    ).map(lambda found: Scripted({peer: (Outage(at, at + away),) for peer, (at, away) in found.items()})),
    st.integers(0, 10_000).map(lambda seed: Poisson(seed=seed, mean_up_s=400.0, mean_down_s=20.0)),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@example(
    churn=Poisson(seed=342, mean_up_s=400.0, mean_down_s=20.0),
    extra=[1, 1, 1, 1],
    boundary_bytes=0.5,
    in_flight=1,
    rules=SWARM,
    ema=False,
    swarm=False,
    tied=False,
    room=0,
    far=set(),
)
@given(
    churn=CHURNS,
    extra=st.lists(st.integers(0, 2), max_size=4),
    boundary_bytes=st.sampled_from([0.0, 0.5, 3.0]),
    in_flight=st.integers(1, 4),
    rules=st.sampled_from(RULES),
    ema=st.booleans(),
    swarm=st.booleans(),
    tied=st.booleans(),
    room=st.integers(0, 3),
    far=st.sets(st.integers(0, 6), max_size=4),
)
def test_whoever_dies_every_microbatch_counts_once(
    churn: Churn,
    extra: list[int],
    boundary_bytes: float,
    in_flight: int,
    rules: RecoveryRules,
    ema: bool,
    swarm: bool,
    tied: bool,
    room: int,
    far: set[int],
) -> None:
    """The ledger asserts it before every sum; here also: no pass starts before its tensors are made."""
    job = routed(
        7, 3, microbatches=4, boundary_bytes=boundary_bytes, state_bytes=2.0, weight_bytes=1.0, in_flight=in_flight
    )
    if tied:
        job = replace(job, weights=(*job.weights, SharedWeights((0, 2), 1.0)))
    if room:
        job = replace(job, memory=memory_for_two(7, 3, room))
    # Machines behind slow links are relieved in the middle of a step.
    links = np.array(job.bandwidth)
    for machine in far:
        links[machine, :], links[:, machine], links[machine, machine] = 0.02, 0.02, np.inf
    job = replace(job, bandwidth=links)
    holders: Holders = [[0], [1], [2]]
    for number, stage in enumerate(extra):
        holders[stage].append(3 + number)
    report = run(
        job,
        holders,
        policy=EmaHeap() if ema else None,
        membership=SwarmMembership(job, sum(map(len, holders))) if swarm else None,
        churn=churn,
        rules=rules,
        steps=3,
        record_steps=3,
        longest_s=100_000.0,
    )
    assert report.finished, report.ended_because
    assert report.waived == 0 or rules.counted == "forgotten"
    first_end: dict[tuple[int, int, bool, int], float] = {}
    for each in report.passes:
        key = each.step, each.stage, each.backward, each.microbatch
        first_end[key] = min(first_end.get(key, each.end_s), each.end_s)
    if not report.rolled_back and rules.counted != "forgotten":
        for each in report.passes:
            if not each.backward and each.stage:
                assert each.start_s >= first_end[each.step, each.stage - 1, False, each.microbatch] - 1e-9
            if each.backward and each.stage < 2:
                assert each.start_s >= first_end[each.step, each.stage + 1, True, each.microbatch] - 1e-9
        assert {key[1:] for key in first_end if key[0] == 0} == {
            (stage, backward, each) for stage in range(3) for backward in (False, True) for each in range(4)
        }


@pytest.mark.slow
def test_a_planned_step_takes_about_what_was_estimated() -> None:
    for seed in range(5):
        draw = random.Random(seed)
        members = [member(f"m{each}", gflops=draw.uniform(5, 30), memory_bytes=GB) for each in range(8)]
        work = costs_in_segments(task(members, decoder(5), microbatches=48, bytes_per_s=10 ** draw.uniform(7.5, 9.5)))
        _, holders, job = best_stages(work)
        report = run(job, [list(each) for each in holders], steps=2)
        assert 0.7 < step_estimate(job, holders).step_s / report.step_s[0] < 1.1


@pytest.mark.parametrize("swarm", [False, True])
def test_the_owners_stages_stay_with_the_owner(swarm: bool) -> None:
    members = [member(f"m{each}", gflops=5.0) for each in range(6)]
    work = costs_in_segments(task(members, decoder(4), microbatches=32, private=True))
    _, holders, job = best_stages(work)
    churn = Poisson(seed=3, mean_up_s=40.0, mean_down_s=2.0, steady=frozenset({"p-owner"}))
    report = run(
        job,
        [list(each) for each in holders],
        membership=SwarmMembership(job, sum(map(len, holders))) if swarm else None,
        churn=churn,
        steps=20,
        record_steps=20,
    )
    assert report.finished
    assert {each.peer for each in report.passes if each.stage in (0, job.stages - 1)} == {"p-owner"}
    assert "p-owner" not in {each.peer for each in report.passes if 0 < each.stage < job.stages - 1}


def test_holders_are_checked() -> None:
    job = routed(2, 2, microbatches=2)
    with pytest.raises(ConfigError, match="no holder"):
        run(job, [[0], []])
    with pytest.raises(ConfigError, match="stages"):
        run(job, [[0]])
    with pytest.raises(ConfigError, match="steps"):
        RoutingScenario(steps=0)
    with pytest.raises(ConfigError, match="detection_s"):
        replace(FUSION, detection_s=-1.0)
