"""A found plan worked through by the simulator: one of its pipelines, every pass, each machine's link shared."""

from __future__ import annotations

from dataclasses import replace

from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.codecs import Codec
from fusionai.simulation.headline.card_clusters import Cluster
from fusionai.simulation.headline.plan_search import PlanSearch, UniformPlan
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulator import simulate_workload
from fusionai.simulation.workload import EdgeLoad, PipelineLoad, StageLoad, Workload

_FEWEST_WORKED = 96
_WORKED_PER_STAGE = 4
"""Microbatches that are worked through; of more, each takes as long as those of the second half did."""


def simulated_pipeline_s(found: UniformPlan, cluster: Cluster) -> float:
    """Return the simulator's seconds for one of the pipelines; the formula's for a single stage, which has no links.

    For training: the simulator knows passes there and back.
    """
    if found.stages == 1:
        return found.pipeline_s
    most = max(_FEWEST_WORKED, _WORKED_PER_STAGE * found.stages)
    if found.microbatches <= most:
        return simulated_s(found, cluster, found.microbatches)
    half_s, whole_s = (simulated_s(found, cluster, count) for count in (most // 2, most))
    return whole_s + (found.microbatches - most) * (whole_s - half_s) / (most - most // 2)


def best_worked(
    searcher: PlanSearch, ranked: list[UniformPlan], cluster: Cluster, codec: Codec
) -> tuple[UniformPlan, float]:
    """Return the plan whose step is shortest by the simulator, its seconds as worked, and the factor on the formula's.

    `ranked` are plans by the formulas, at least one.
    """
    tried: list[tuple[float, UniformPlan, float]] = []
    for plan in ranked:
        if tried and plan.step_s - plan.pipeline_s >= min(step_s for step_s, _, _ in tried):
            continue
        for each in searcher.variants(plan, cluster, codec):
            seconds = simulated_pipeline_s(each, cluster)
            step_s = each.step_s - each.pipeline_s + seconds
            tried.append((step_s, replace(each, step_s=step_s, pipeline_s=seconds), seconds / each.pipeline_s))
    _, found, factor = min(tried, key=lambda each: each[0])
    return found, factor


def simulated_s(found: UniformPlan, cluster: Cluster, count: int) -> float:
    """Return the simulator's seconds for so many microbatches in one of a plan's pipelines."""
    stages = tuple(
        StageLoad(
            peer=f"m{place}",
            forward_s=forward,
            backward_s=backward,
            in_flight=min(held, count),
            deferred_s=deferred,
        )
        for place, (forward, backward, deferred, held) in enumerate(
            zip(found.pace.forward_s, found.pace.backward_s, found.pace.deferred_s, found.pace.in_flight, strict=True)
        )
    )
    edges = tuple(
        EdgeLoad(place, place + 1, forward, gradient) for place, (forward, gradient) in enumerate(found.sent_bytes)
    )
    profile = LinkProfile(rtt_s=2 * cluster.latency_s, bandwidth_bytes_per_s=cluster.bytes_per_s)
    shared = {stage.peer: cluster.bytes_per_s for stage in stages}
    report = simulate_workload(
        Workload((PipelineLoad(stages, edges, count),)),
        LinkRates(lambda source, target: profile, up_bytes_per_s=shared, down_bytes_per_s=shared),
        Scenario(steps=1),
    )
    return report.elapsed_s * report.passes_share
