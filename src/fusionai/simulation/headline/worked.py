"""A found plan worked through by the simulator: one of its pipelines, every pass, each machine's link shared."""

from __future__ import annotations

from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.headline.clusters import Cluster
from fusionai.simulation.headline.search import Found
from fusionai.simulation.links import Links
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulator import simulate_workload
from fusionai.simulation.workload import EdgeLoad, PipelineLoad, StageLoad, Workload

_MOST_MICROBATCHES = 256
"""That are worked through; the others take as long as the formulas say of a full pipeline."""

_FORWARD_SHARE = 1 / 3
"""Of a microbatch's computing: the backward of products takes twice the forward."""


def worked_through(found: Found, cluster: Cluster) -> float:
    """Return by what factor the simulator's pipeline takes longer than `Found.pipeline_s`; 1 for a single stage.

    For training: the simulator knows passes there and back.
    """
    if found.stages == 1:
        return 1.0
    count = min(found.microbatches, _MOST_MICROBATCHES)
    stages = tuple(
        StageLoad(
            peer=f"m{place}",
            forward_s=seconds * _FORWARD_SHARE,
            backward_s=seconds * (1 - _FORWARD_SHARE),
            in_flight=min(held, count),
        )
        for place, (seconds, held) in enumerate(zip(found.computing_s, found.in_flight, strict=True))
    )
    edges = tuple(
        EdgeLoad(place, place + 1, forward, gradient) for place, (forward, gradient) in enumerate(found.sent_bytes)
    )
    profile = LinkProfile(rtt_s=2 * cluster.latency_s, bandwidth_bytes_per_s=cluster.bytes_per_s)
    shared = {stage.peer: cluster.bytes_per_s for stage in stages}
    report = simulate_workload(
        Workload((PipelineLoad(stages, edges, count),)),
        Links(lambda source, target: profile, up_bytes_per_s=shared, down_bytes_per_s=shared),
        Scenario(steps=1),
    )
    by_formula_s = found.latency_s + (count - 1) * found.period_s
    return report.elapsed_s * report.passes_share / by_formula_s
