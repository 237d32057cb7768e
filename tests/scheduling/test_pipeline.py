"""The pipeline's times against closed formulas and against an independent simulation in small time steps."""

from __future__ import annotations

import random

import pytest

from fusionai.scheduling.pipeline import Edge, StageTimes, executed_round, pipeline_times


def chain(forward: list[int], backward: list[int], in_flight: list[int], machines: list[str]) -> list[StageTimes]:
    return [StageTimes(*each) for each in zip(machines, forward, backward, in_flight, strict=True)]


def test_equal_stages_match_the_closed_formula() -> None:
    # 1F1B over S equal stages without links: (M + S - 1)(f + b).
    for count in range(1, 6):
        for microbatches in (1, 3, 8):
            stages = [StageTimes(f"m{k}", 1.0, 2.0, count - k) for k in range(count)]
            edges = [Edge(k, k + 1, 0.0, 0.0, 0.0) for k in range(count - 1)]
            assert pipeline_times(stages, edges, microbatches).makespan_s == pytest.approx(
                (microbatches + count - 1) * 3
            )


def simulate(stages: list[StageTimes], edges: list[Edge], microbatches: int) -> float:
    """Advance an integer clock; machines, links and arrivals are looked at in every tick. Durations are whole."""
    done = [{"F": 0, "B": 0} for _ in stages]  # passes begun
    arrived: dict[tuple[str, int, int, int], float] = {}  # (direction, edge, index, target): time
    machine_until: dict[str, float] = {}
    running: list[tuple[float, int, str, int]] = []
    link_until: dict[tuple[str, str], float] = {}
    now, end = 0, 0.0
    while running or any(each["B"] < microbatches for each in done):
        for item in sorted(item for item in running if item[0] == now):
            running.remove(item)
            _, stage, direction, index = item
            end = now
            for number, edge in enumerate(edges):
                if direction == "F" and edge.source == stage:
                    other, seconds = edge.target, edge.forward_s
                elif direction == "B" and edge.target == stage and edge.backward_s is not None:
                    other, seconds = edge.source, edge.backward_s
                else:
                    continue
                here, there = stages[stage].machine, stages[other].machine
                if here == there:
                    arrival = float(now)
                else:
                    link_until[here, there] = max(link_until.get((here, there), 0), now) + seconds
                    arrival = link_until[here, there] + edge.delay_s
                arrived[direction, number, index, other] = arrival
        for machine in {stage.machine for stage in stages}:
            if machine_until.get(machine, 0) > now:
                continue
            offers = {}  # The one pass that each stage would run now: its forward if there is room and it is here.
            for stage in range(len(stages)):
                for wanted in "FB":
                    index, held = done[stage][wanted], done[stage]["F"] - done[stage]["B"]
                    due = held > 0 if wanted == "B" else index < microbatches and held < stages[stage].in_flight
                    if stages[stage].machine != machine or not due or stage in offers:
                        continue
                    needs = [
                        (wanted, number, index, stage)
                        for number, edge in enumerate(edges)
                        if (wanted == "F" and edge.target == stage)
                        or (wanted == "B" and edge.source == stage and edge.backward_s is not None)
                    ]
                    if all(arrived.get(need, 1e18) <= now for need in needs):
                        offers[stage] = wanted
            for wanted in "BF":
                if taken := [stage for stage in offers if offers[stage] == wanted]:
                    stage = max(taken)
                    seconds = stages[stage].forward_s if wanted == "F" else stages[stage].backward_s
                    machine_until[machine] = now + seconds
                    running.append((now + seconds, stage, wanted, done[stage][wanted]))
                    done[stage][wanted] += 1
                    break
        now += 1
        assert now < 100_000, "locked"
    return end


@pytest.mark.parametrize("seed", range(60))
def test_equals_a_simulation(seed: int) -> None:
    draw = random.Random(seed)
    count, microbatches = draw.randint(1, 5), draw.randint(1, 7)
    owner_holds_both_ends = count >= 3 and draw.random() < 0.6
    machines = [f"m{k}" for k in range(count)]
    if owner_holds_both_ends:
        machines[0] = machines[-1] = "owner"
    in_flight = [draw.randint(1, 6) for _ in range(count)]
    stages = chain(
        [draw.randint(1, 9) for _ in range(count)], [draw.randint(1, 15) for _ in range(count)], in_flight, machines
    )
    edges = [Edge(k, k + 1, draw.randint(0, 6), draw.randint(0, 6), draw.randint(0, 4)) for k in range(count - 1)]
    if count >= 3 and draw.random() < 0.5:  # a residual that skips a stage, without a gradient half of the time
        edges.append(Edge(0, 2, draw.randint(0, 3), draw.choice([None, 2]), draw.randint(0, 2)))
    assert pipeline_times(stages, edges, microbatches).makespan_s == simulate(stages, edges, microbatches)


@pytest.mark.parametrize("seed", range(30))
def test_gradients_that_share_a_link_are_sent_in_the_order_of_edges(seed: int) -> None:
    """A stage that takes tensors from two stages of one machine; which is sent first decides who waits."""
    draw = random.Random(seed)
    stages = chain(
        [draw.randint(1, 9) for _ in range(3)], [draw.randint(1, 15) for _ in range(3)], [3, 2, 2], ["a", "a", "b"]
    )
    edges = [Edge(*ends, draw.randint(1, 9), draw.randint(1, 9), draw.randint(0, 4)) for ends in ((0, 1), (1, 2))]
    edges.insert(draw.randint(0, 2), Edge(0, 2, draw.randint(1, 9), draw.randint(1, 9), draw.randint(0, 4)))
    assert pipeline_times(stages, edges, 5).makespan_s == simulate(stages, edges, 5)


@pytest.mark.parametrize("seed", range(10))
def test_half_a_long_round_is_what_it_is_by_itself(seed: int) -> None:
    """The two share their first passes, and are worked through once as far as they are the same."""
    draw = random.Random(seed)
    count = draw.randint(1, 5)
    stages = chain(
        [draw.uniform(1, 9) for _ in range(count)],
        [draw.uniform(1, 15) for _ in range(count)],
        [draw.randint(1, 6) for _ in range(count)],
        [draw.choice("abcde") for _ in range(count)],
    )
    edges = [Edge(k, k + 1, draw.uniform(0, 6), draw.uniform(0, 6), draw.uniform(0, 4)) for k in range(count - 1)]
    found = executed_round(stages, edges, 1000)
    assert found.half == pipeline_times(stages, edges, found.executed // 2)
    assert found.whole == pipeline_times(stages, edges, found.executed)


def test_busy_seconds_add_up() -> None:
    stages = chain([1, 2, 1], [2, 4, 3], [3, 2, 1], ["owner", "a", "owner"])
    edges = [Edge(0, 1, 0.5, 0.25, 0.1), Edge(1, 2, 0.5, 0.25, 0.1)]
    times = pipeline_times(stages, edges, 4)
    assert times.busy_s == {"owner": 4 * 7, "a": 4 * 6}
    assert times.link_busy_s == {("owner", "a"): 4 * 0.75, ("a", "owner"): 4 * 0.75}


def test_a_slow_link_sets_the_pace() -> None:
    stages = chain([1, 1], [1, 1], [40, 1], ["a", "b"])
    slow = pipeline_times(stages, [Edge(0, 1, 10.0, 10.0, 0.0)], 40).makespan_s
    assert 400 <= slow <= 440


def test_delay_is_hidden_by_more_in_flight() -> None:
    edges = [Edge(0, 1, 0.0, 0.0, 10.0)]
    few = pipeline_times(chain([1, 1], [1, 1], [2, 1], ["a", "b"]), edges, 40).makespan_s
    many = pipeline_times(chain([1, 1], [1, 1], [14, 1], ["a", "b"]), edges, 40).makespan_s
    assert many < 0.4 * few


def test_equal_limits_do_not_make_a_stage_wait_for_its_predecessor() -> None:
    # Three in flight everywhere. Were the second stage's turns fixed, each of its backwards would wait for the forward
    # of the microbatch after next, which the first stage sends only after the backward before.
    edges = [Edge(0, 1, 0.0, 0.0, 1.0)]
    times = pipeline_times(chain([1, 1], [1, 1], [3, 3], ["a", "b"]), edges, 40)
    assert times.makespan_s <= 40 * 2 + 8


def test_nothing_in_flight_is_refused() -> None:
    with pytest.raises(ValueError, match="may hold no microbatch"):
        pipeline_times(chain([1, 1], [1, 1], [1, 0], ["a", "b"]), [Edge(0, 1, 0.0, 0.0, 0.0)], 4)
