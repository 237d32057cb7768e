"""Who routes and who places: hand-worked decisions of both policies and both memberships."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from contenders.routers.balanced import BalancedMembership
from contenders.routers.ema_heap import EmaHeap, EmaHeapConfig
from contenders.routers.expected_finish import ExpectedFinish
from contenders.routers.membership import Placement, Staffing, SwarmMembership
from contenders.routers.route_policy import Hop
from contenders.routers.routed_job import DRIVER, RoutedJob, SharedWeights, StageMemory
from contenders.routers.step_estimate import step_estimate
from fusionai.errors import ConfigError


def job(machines: int, stages: int, **changes: object) -> RoutedJob:
    """Return a job whose passes take 1 and 2 s, whose tensors 1 s on every link, and whose states 5 s."""
    shape = stages, machines
    bandwidth, delay = np.ones((machines, machines)), np.zeros((machines, machines))
    np.fill_diagonal(bandwidth, np.inf)
    made = RoutedJob(
        peers=tuple(f"m{each}" for each in range(machines)),
        microbatches=8,
        forward_s=np.full(shape, 1.0),
        backward_s=np.full(shape, 2.0),
        deferred_s=np.zeros(shape),
        update_s=np.zeros(shape),
        in_flight=np.full(shape, 8, dtype=np.int64),
        forward_bytes=(0.0, *[1.0] * (stages - 1)),
        gradient_bytes=(0.0, *[1.0] * (stages - 1)),
        state_bytes=(5.0,) * stages,
        weights=(),
        bandwidth=bandwidth,
        delay_s=delay,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def known(made: RoutedJob, holders: list[list[int]]) -> ExpectedFinish:
    policy = ExpectedFinish(made)
    for stage, machines in enumerate(holders):
        for machine in machines:
            policy.joined(stage, machine)
    return policy


def test_an_ema_heap_uses_peers_in_proportion_to_their_speed() -> None:
    policy = EmaHeap()
    for machine, response_s in ((0, 1.0), (1, 2.0), (2, 4.0)):
        policy.answered(DRIVER, 0, machine, response_s)
    taken = Counter(policy.choose(Hop(0.0, DRIVER, 0, each), [0, 1, 2]) for each in range(700))
    assert taken[0] == pytest.approx(400, abs=3)
    assert taken[1] == pytest.approx(200, abs=3)
    assert taken[2] == pytest.approx(100, abs=3)


def test_an_ema_heap_bans_who_does_not_answer_until_it_joins_again() -> None:
    policy = EmaHeap(EmaHeapConfig(smoothing=0.5, patience=3.0, least_wait_s=2.0))
    assert policy.wait_s(7, 1, 0) == 2.0
    policy.answered(7, 1, 0, 4.0)
    policy.answered(7, 1, 0, 8.0)
    assert policy.wait_s(7, 1, 0) == 3.0 * 6.0
    policy.unanswered(7, 1, 0)
    assert {policy.choose(Hop(0.0, 7, 1, each), [0, 1]) for each in range(5)} == {1}
    # Another sender has found out nothing.
    assert {policy.choose(Hop(0.0, 8, 1, each), [0, 1]) for each in range(4)} == {0, 1}
    policy.joined(1, 0)
    assert 0 in {policy.choose(Hop(0.0, 7, 1, each), [0, 1]) for each in range(5)}
    # When all are banned, all are tried again.
    for machine in (0, 1):
        policy.unanswered(7, 1, machine)
    assert policy.choose(Hop(0.0, 7, 1, 9), [0, 1]) in (0, 1)
    with pytest.raises(ConfigError, match="smoothing"):
        EmaHeapConfig(smoothing=0.0)


def test_a_backlog_sends_microbatches_elsewhere() -> None:
    policy = known(job(2, 1), [[0, 1]])
    chosen = []
    for each in range(4):
        hop = Hop(0.0, DRIVER, 0, each)
        chosen.append(policy.choose(hop, [0, 1]))
        policy.assigned(hop, chosen[-1])
    assert chosen == [0, 1, 0, 1]
    # Machine 1 finishes both, machine 0 nothing.
    for _ in range(2):
        policy.computed(0, 1, backward=False)
        policy.computed(0, 1, backward=True)
    assert [policy.choose(Hop(6.0, DRIVER, 0, each), [0, 1]) for each in range(1)] == [1]
    policy.withdrawn(0, 0, forward_done=False, backward_done=False)
    policy.withdrawn(0, 0, forward_done=False, backward_done=False)
    assert policy.choose(Hop(6.0, DRIVER, 0, 5), [0, 1]) == 0


def test_the_whole_path_counts_and_not_only_the_next_hop() -> None:
    # Machine 1 is faster than machine 0, but its links to the last stage take 50 s.
    bandwidth = np.ones((3, 3))
    bandwidth[1, 2] = bandwidth[2, 1] = 0.02
    forward = np.full((2, 3), 1.0)
    forward[0, 1] = 0.1
    made = job(3, 2, bandwidth=bandwidth, forward_s=forward)
    assert known(made, [[0, 1], [2]]).choose(Hop(0.0, DRIVER, 0, 0), [0, 1]) == 0
    assert known(made, [[0, 1], []]).choose(Hop(0.0, DRIVER, 0, 0), [0, 1]) == 1


def test_a_machine_whose_memory_is_full_is_waited_for() -> None:
    in_flight = np.full((2, 3), 8, dtype=np.int64)
    in_flight[0, 0] = 1
    policy = known(job(3, 2, in_flight=in_flight), [[0, 1], [2]])
    for machine in (0, 1):
        policy.assigned(Hop(0.0, DRIVER, 0, machine), machine)
    # Both have 3 s of work, but machine 0 has no room until the microbatch is back: 3 + 1 + 3 + 1 s.
    assert policy.choose(Hop(0.0, DRIVER, 0, 2), [0, 1]) == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_path_is_the_best_of_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    stages, width = 3, 3
    machines = stages * width
    holders = [list(range(stage * width, (stage + 1) * width)) for stage in range(stages)]
    made = job(
        machines,
        stages,
        bandwidth=draw.uniform(0.1, 5.0, (machines, machines)),
        delay_s=draw.uniform(0.0, 0.3, (machines, machines)),
        forward_s=draw.uniform(0.5, 3.0, (stages, machines)),
        backward_s=draw.uniform(0.5, 3.0, (stages, machines)),
    )
    policy = known(made, holders)
    backlog = dict.fromkeys(range(machines), 0.0)
    for each in range(6):
        stage = int(draw.integers(stages))
        machine = int(draw.choice(holders[stage]))
        policy.assigned(Hop(0.0, DRIVER, stage, each), machine)
        backlog[machine] += made.pass_s(stage, machine)

    def finish_s(path: tuple[int, ...]) -> float:
        at_s, before = 0.0, None
        for stage, machine in enumerate(path):
            if before is not None:
                at_s += 1 / made.bandwidth[before, machine] + 1 / made.bandwidth[machine, before]
                at_s += made.delay_s[before, machine] + made.delay_s[machine, before]
            at_s = max(at_s, backlog[machine]) + made.pass_s(stage, machine)
            before = machine
        return at_s

    best = min(itertools.product(*holders), key=finish_s)
    assert policy.choose(Hop(0.0, DRIVER, 0, 99), holders[0]) == best[0]


def test_a_ring_takes_its_closed_form() -> None:
    made = job(4, 1, weights=(SharedWeights((0,), 12.0),), delay_s=np.full((4, 4), 0.5))
    # 2 (R - 1) rounds of 12 / R bytes at one byte a second and half a second of latency.
    assert made.sum_s([[0, 1, 2]]) == pytest.approx(4 * (4.0 + 0.5))
    assert made.sum_s([[0]]) == 0.0
    tied = job(4, 2, weights=(SharedWeights((0, 1), 12.0), SharedWeights((0,), 6.0)))
    # Machines 0 and 1 sum both weights, one after the other.
    assert tied.sum_s([[0, 1], [2]]) == pytest.approx(4 * 4.0 + 2 * 3.0)


def test_the_estimate_of_a_pipeline_and_of_two_holders() -> None:
    made = job(3, 2)
    # 3 + 1 + 3 + 1 s for the first, then one every 3 s.
    assert step_estimate(made, [[0], [1]]).step_s == pytest.approx(8 + 7 * 3)
    assert step_estimate(made, [[0], [1]]).limit == "stage 0"
    two = step_estimate(made, [[0, 2], [1]])
    assert (two.step_s, two.limit) == (pytest.approx(8 + 7 * 3), "stage 1")
    full = job(3, 2, in_flight=np.full((2, 3), 1, dtype=np.int64))
    assert step_estimate(full, [[0], [1]]).step_s == pytest.approx(8 * 8)
    assert step_estimate(made, [[0], []]).step_s == math.inf


def test_an_empty_stage_comes_first() -> None:
    made = job(4, 2)
    balanced = BalancedMembership(made)
    assert balanced.placements(Staffing(0.0, ((0, 1), ()), (3,))) == (Placement(3, 1),)
    # Nobody is spare: the stage with two holders gives one.
    assert balanced.placements(Staffing(0.0, ((0, 1), ()), ())) == (Placement(0, 1),)
    assert balanced.placements(Staffing(0.0, ((0,), ()), ())) == ()


def roomy(machines: int, stages: int, offered: float = 10.0) -> StageMemory:
    """Return memory of which a stage needs 2 bytes, and 1 for each microbatch that it holds."""
    return StageMemory(np.full((stages, machines), 2.0), np.ones(stages), np.full(machines, offered))


def test_room_for_two_stages() -> None:
    alone = job(2, 3)
    assert alone.room(0, 0, [0]) == 8
    assert alone.room(0, 0, [1]) == 0  # what it has room for is not known
    made = job(2, 3, memory=roomy(2, 3))
    # Two stages leave 6 bytes, three 4: of each stage equally many.
    assert made.room(0, 0, [0, 1]) == made.room(1, 0, [0]) == 3
    assert made.room(0, 0, [0, 1, 2]) == 1
    assert job(2, 3, memory=roomy(2, 3, 5.5)).room(0, 0, [1]) == 0
    # A stage that does not fit alone does not fit with another either.
    small = np.full((3, 2), 8, dtype=np.int64)
    small[1, 0] = 0
    assert job(2, 3, memory=roomy(2, 3), in_flight=small).room(0, 0, [1]) == 0
    # The owner's pinned stages are counted each by itself.
    assert job(2, 3, pinned=frozenset({0, 2}), memory=roomy(2, 3)).room(0, 0, [2]) == 8


def test_the_estimate_of_a_machine_with_two_stages() -> None:
    made = job(3, 2, memory=roomy(3, 2))
    # 6 s for each of 8 microbatches, nothing over a link.
    assert step_estimate(made, [[0], [0]]).step_s == pytest.approx(8 * 6)
    # Machine 2 helps with the first stage at 1/3 a second, machine 0 gives each stage 1/6.
    assert step_estimate(made, [[0, 2], [0]]).period_s == pytest.approx(6.0)
    full = job(3, 2, memory=roomy(3, 2, 5.0))
    assert step_estimate(full, [[0], [0]]).step_s == math.inf


def test_a_holder_takes_an_empty_stage_too() -> None:
    weights = (SharedWeights((0,), 1.0), SharedWeights((1,), 1.0), SharedWeights((2,), 1.0))
    made = job(3, 2, memory=roomy(3, 2), weights=weights[:2])
    assert BalancedMembership(made).placements(Staffing(0.0, ((0,), ()), ())) == (Placement(0, 1, keeps=True),)
    # A machine of the pool that is as near does it alone.
    assert BalancedMembership(made).placements(Staffing(0.0, ((0,), ()), (2,))) == (Placement(2, 1),)
    # One far away would take longer for each tensor than machine 0 for both stages.
    far = np.array(made.bandwidth)
    far[2, :2] = far[:2, 2] = 0.005
    apart = dataclasses.replace(made, bandwidth=far)
    assert BalancedMembership(apart).placements(Staffing(0.0, ((0,), ()), (2,))) == (Placement(0, 1, keeps=True),)
    # Two stages are empty: whoever is near takes both, not one of them and somebody far the other.
    three = job(3, 3, memory=roomy(3, 3), bandwidth=far, weights=weights)
    found = BalancedMembership(three).placements(Staffing(0.0, ((0,), (), ()), (2,)))
    assert found == (Placement(0, 1, keeps=True), Placement(0, 2, keeps=True))


def test_who_comes_back_relieves_whoever_holds_two_stages() -> None:
    made = job(3, 2, memory=roomy(3, 2))
    (found,) = BalancedMembership(made).placements(Staffing(0.0, ((0,), (0,)), (2,)))
    assert (found.machine, found.replaces, found.at_once) == (2, 0, False)


def test_who_is_behind_a_slow_link_is_relieved_at_once() -> None:
    far = np.ones((3, 3))
    np.fill_diagonal(far, np.inf)
    far[1], far[:, 1] = 1e-3, 1e-3
    made = job(3, 2, bandwidth=far)
    # A step would take 8,000 s; loading takes 5 s from a snapshot near by, what is done again 30 s.
    assert BalancedMembership(made).placements(Staffing(0.0, ((0,), (1,)), (2,))) == (
        Placement(2, 1, replaces=1, at_once=True),
    )


def test_two_who_hold_the_step_up_are_relieved_together() -> None:
    far = np.ones((5, 5))
    np.fill_diagonal(far, np.inf)
    far[:2, 2:] = far[2:, :2] = 0.02  # 0 and 1 are near each other, and far from 2, 3 and 4
    made = job(5, 3, bandwidth=far, state_bytes=(0.1, 0.1, 0.1))
    view = Staffing(100.0, ((0,), (2,), (1,)), (3, 4))
    moved = BalancedMembership(made).moves(view)
    assert {(each.stage, each.replaces) for each in moved} == {(0, 0), (2, 1)}
    assert {each.machine for each in moved} == {3, 4}


def test_who_would_slow_the_sum_down_stays_in_the_pool() -> None:
    bandwidth = np.ones((3, 3))
    bandwidth[2], bandwidth[:, 2] = 1e-3, 1e-3
    weights = (SharedWeights((0,), 1.0),)
    slow = job(3, 1, bandwidth=bandwidth, weights=weights)
    assert BalancedMembership(slow).placements(Staffing(0.0, ((0, 1),), (2,))) == ()
    fast = job(3, 1, weights=weights)
    assert BalancedMembership(fast).placements(Staffing(0.0, ((0, 1),), (2,))) == (Placement(2, 0),)
    # SWARM does not look at links.
    assert SwarmMembership(slow, 3).placements(Staffing(0.0, ((0, 1),), (2,))) == (Placement(2, 0),)


def test_a_thin_stage_gets_a_second_holder_where_machines_die() -> None:
    # A sum among two costs 2 s of a step of 29, and a second holder saves nothing: the other stage is the limit.
    made = job(3, 2, weights=(SharedWeights((0,), 2.0), SharedWeights((1,), 2.0)))
    calm = Staffing(1000.0, ((0,), (1,)), (2,))
    assert BalancedMembership(made).placements(calm) == ()
    assert BalancedMembership(made).placements(dataclasses.replace(calm, deaths=1)) == ()
    # A hundredth of the machines dies every second: half of five steps, and 5 s of loading, would be lost too often.
    assert len(BalancedMembership(made).placements(dataclasses.replace(calm, deaths=30))) == 1


def test_moves() -> None:
    forward = np.full((2, 4), 1.0)
    forward[1] = 5.0
    made = job(4, 2, forward_s=forward, state_bytes=(1.0, 1.0))
    uneven = Staffing(100.0, ((0, 1, 2), (3,)), (), {0: 0.0, 1: 1.0, 2: 2.0, 3: 9.0})
    moved = BalancedMembership(made).moves(uneven)
    assert len(moved) == 1
    assert moved[0].stage == 1
    # The shortest queue of the idle stage goes to the busy one, but not before the period is over.
    swarm = SwarmMembership(made, 4, period_s=60.0)
    assert swarm.moves(uneven) == (Placement(0, 1),)
    assert swarm.moves(dataclasses.replace(uneven, now_s=130.0)) == ()
    # A state that takes longer to move than it will ever save stays.
    heavy = dataclasses.replace(made, state_bytes=(1.0, 1e9))
    assert BalancedMembership(heavy).moves(uneven) == ()


def test_tables_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="forward_s"):
        job(3, 2, forward_s=np.ones((1, 3)))
    with pytest.raises(ConfigError, match="microbatches"):
        job(3, 2, microbatches=0)
