"""Small workloads whose seconds are given, for the tests of the simulator."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fusionai.scheduling.pipeline import Edge, StageTimes
from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.workload import EdgeLoad, PipelineLoad, StageLoad, WeightGroup, Workload


def uniform(bytes_per_s: float = 1.0, rtt_s: float = 0.0) -> LinkRates:
    """Return links that are all alike; at one byte a second, bytes are seconds."""
    profile = LinkProfile(rtt_s, bytes_per_s)
    return LinkRates(lambda source, target: profile)


def chain(
    prefix: str,
    count: int,
    *,
    microbatches: int,
    forward_s: float = 1.0,
    backward_s: float = 2.0,
    boundary_bytes: float = 0.0,
    update_s: float = 0.0,
    state_bytes: int = 0,
    in_flight: Sequence[int] | None = None,
) -> PipelineLoad:
    """Return a pipeline of equal stages on machines prefix0, prefix1, ..."""
    stages = tuple(
        StageLoad(
            peer=f"{prefix}{place}",
            forward_s=forward_s,
            backward_s=backward_s,
            in_flight=in_flight[place] if in_flight else count - place,
            update_s=update_s,
            state_bytes=state_bytes,
            memory_bytes=1,
        )
        for place in range(count)
    )
    edges = tuple(EdgeLoad(place, place + 1, boundary_bytes, boundary_bytes) for place in range(count - 1))
    return PipelineLoad(stages, edges, microbatches)


def replicas(pipelines: int, stages: int, *, microbatches: int, weight_bytes: float, **options: float) -> Workload:
    """Return pipelines alike, whose stages of the same place hold the same weights."""
    loads = tuple(chain(f"p{each}-", stages, microbatches=microbatches, **options) for each in range(pipelines))  # type: ignore[arg-type]
    groups = tuple(
        WeightGroup(tuple((each, place) for each in range(pipelines)), weight_bytes) for place in range(stages)
    )
    return Workload(loads, groups, driver="owner", state_copies=3)


def random_case(seed: int) -> tuple[list[StageTimes], list[Edge], int, Workload, LinkRates]:
    """Return one pipeline as `pipeline_times` takes it, and as the simulator does, links of one byte a second."""
    draw = random.Random(seed)
    count, microbatches = draw.randint(1, 6), draw.randint(1, 9)
    machines = [f"m{place}" for place in range(count)]
    if count >= 3 and draw.random() < 0.6:
        machines[0] = machines[-1] = "owner"
    in_flight = [draw.randint(1, 6) for _ in range(count)]
    stages = []
    for machine, held in zip(machines, in_flight, strict=True):
        backward_s = draw.uniform(0.1, 2.0)
        deferred_s = draw.choice([0.0, backward_s * draw.random()])
        stages.append(StageTimes(machine, draw.uniform(0.1, 1.0), backward_s, held, deferred_s))
    delays_s = {frozenset(pair): draw.uniform(0.0, 0.5) for pair in ((a, b) for a in machines for b in machines)}

    def edge(source: int, target: int, gradient: bool) -> Edge:
        delay_s = delays_s[frozenset((machines[source], machines[target]))]
        return Edge(source, target, draw.uniform(0.0, 1.0), draw.uniform(0.0, 1.0) if gradient else None, delay_s)

    edges = [edge(place, place + 1, True) for place in range(count - 1)]
    if count >= 3 and draw.random() < 0.6:
        edges.append(edge(0, count - 1, draw.random() < 0.5))
    load = PipelineLoad(
        tuple(
            StageLoad(
                peer=each.machine,
                forward_s=each.forward_s,
                backward_s=each.backward_s,
                in_flight=each.in_flight,
                deferred_s=each.deferred_s,
            )
            for each in stages
        ),
        tuple(EdgeLoad(each.source, each.target, each.forward_s, each.backward_s) for each in edges),
        microbatches,
    )

    def link(source: str, target: str) -> LinkProfile:
        delay_s = delays_s.get(frozenset((source, target)), 0.0)
        return LinkProfile(2 * delay_s, 1.0)

    return stages, edges, microbatches, Workload((load,), driver="elsewhere"), LinkRates(link)
