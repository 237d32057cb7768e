"""Random pipelines, deaths and ways to recover: time adds up, and no machine does two things at once."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from workloads import chain, uniform

from fusionai.simulation.availability import Poisson
from fusionai.simulation.codecs import Dense, TopK
from fusionai.simulation.jitter import Jitter
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulated_recovery import Recovery, Replay, Restart
from fusionai.simulation.simulator import simulate_workload
from fusionai.simulation.workload import WeightGroup, Workload


def drawn_pipelines(draw: random.Random) -> Workload:
    """Return up to three pipelines; the owner may hold their ends, a machine may hold two stages."""
    pipelines, stages = draw.randint(1, 3), draw.randint(1, 4)
    owner_holds_ends = stages >= 2 and draw.random() < 0.4
    loads = []
    for number in range(pipelines):
        pipeline = chain(
            f"p{number}-",
            stages,
            microbatches=draw.randint(1, 4),
            forward_s=draw.uniform(0.1, 2.0),
            backward_s=draw.uniform(0.1, 3.0),
            boundary_bytes=draw.choice([0.0, 0.3, 2.0]),
            update_s=draw.choice([0.0, 0.5]),
            state_bytes=draw.randint(1, 20),
        )
        placed = [replace(stage, deferred_s=stage.backward_s * draw.choice([0.0, 0.3])) for stage in pipeline.stages]
        if owner_holds_ends:
            placed[0], placed[-1] = replace(placed[0], peer="owner"), replace(placed[-1], peer="owner")
        elif stages >= 3 and draw.random() < 0.5:
            placed[1] = replace(placed[1], peer=placed[2].peer)
        loads.append(replace(pipeline, stages=tuple(placed)))
    groups = tuple(
        WeightGroup(tuple((number, place) for number in range(pipelines)), draw.uniform(0.0, 5.0))
        for place in range(stages)
    )
    return Workload(tuple(loads), groups, driver="owner", state_copies=3)


@pytest.mark.parametrize("seed", range(200))
def test_time_adds_up(seed: int) -> None:
    draw = random.Random(seed)
    workload = drawn_pipelines(draw)
    spares = {f"spare{number}": draw.choice([1, 2, 9]) for number in range(draw.randint(0, 3))}
    links = uniform(bytes_per_s=draw.choice([1.0, 5.0]), rtt_s=draw.choice([0.0, 0.2]))
    if draw.random() < 0.5:
        rates = {peer: draw.choice([1.0, 5.0]) for peer in (*workload.peers, *spares)}
        links = LinkRates(links.link, rates, rates)
    detection_s, snapshot_steps = draw.choice([0.0, 1.0]), draw.choice([None, 1, 2])
    recovery: Recovery = (
        Replay(detection_s=detection_s, snapshot_steps=snapshot_steps)
        if draw.random() < 0.5
        else Restart(detection_s=detection_s, snapshot_steps=snapshot_steps)
    )
    scenario = Scenario(
        steps=draw.randint(1, 6),
        churn=Poisson(
            seed=seed, mean_up_s=draw.choice([50.0, 200.0, 1000.0]), mean_down_s=20.0, steady=frozenset({"owner"})
        ),
        recovery=recovery,
        jitter=Jitter(seed=seed, spread=0.1) if draw.random() < 0.5 else None,
        codec=draw.choice([Dense(), TopK(ratio=4, value_bytes=1, index_bytes=1)]),
        timeline_steps=6,
        most_failures=50,
    )
    report = simulate_workload(workload, links, scenario, offers_bytes=spares)
    assert report.finished or "most_failures" in report.ended_because
    for machine in report.machines:
        assert machine.busy_s + machine.idle_s + machine.absent_s == pytest.approx(report.elapsed_s)
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in report.timeline:
        spans[each.peer].append((each.start_s, each.end_s))
    for of_machine in spans.values():
        for one, other in pairwise(sorted(of_machine)):
            assert other[0] >= one[1] - 1e-9
    if report.finished and isinstance(recovery, Replay):
        counted = sum(not (each.lost or each.again) for each in report.timeline)
        per_step = sum(2 * len(pipeline.stages) * pipeline.microbatches for pipeline in workload.pipelines)
        assert counted == report.steps * per_step
