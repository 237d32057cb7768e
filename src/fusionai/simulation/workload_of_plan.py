"""The workload of a plan: the graph is cut where the plan says and costed with the planner's estimator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import chain

from fusionai.errors import ConfigError
from fusionai.graph.cost import StageCost, stage_cost
from fusionai.graph.cuts import boundary_bytes, cut
from fusionai.graph.model import OpDag, SubDag
from fusionai.graph.shared_weights import repeated
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import DeviceProfile
from fusionai.simulation.workload import EdgeLoad, PipelineLoad, StageLoad, WeightGroup, Workload, estimated


def workload_of(
    plan: Plan,
    graph: OpDag,
    devices: Mapping[str, DeviceProfile],
    *,
    precision: str,
    optimizer_states: int,
) -> Workload:
    """Return what a plan does.

    Args:
        plan: of any number of pipelines.
        graph: the one that was planned, as arranged (of a private job, by `graph.privacy.arrange_private`).
        devices: profiles of the plan's machines and of all that may take a stage over, by peer.
        precision: "fp32" or "bf16".
        optimizer_states: tensors that the optimizer keeps for each weight (AdamW: 2).

    Raises:
        ConfigError: a machine of the plan has no profile, or the plan's stages are not cuts of this graph.
    """

    @cache
    def stages_at(cuts: tuple[int, ...]) -> tuple[tuple[SubDag, ...], tuple[StageCost, ...], tuple[EdgeLoad, ...]]:
        subdags = tuple(cut(graph, cuts))
        edges = tuple(
            EdgeLoad(source, target, forward, gradients or None)
            for (source, target), (forward, gradients) in boundary_bytes(subdags, plan.sizes).items()
        )
        return subdags, tuple(stage_cost(subdag, plan.sizes) for subdag in subdags), edges

    for number, pipeline in enumerate(plan.pipelines):
        if not pipeline.stages or pipeline.stages[-1].stop != len(graph.nodes):
            raise ConfigError(
                f"pipeline {number} ends at node {pipeline.stages[-1].stop if pipeline.stages else 0}, but the graph "
                f"has {len(graph.nodes)}; simulate a plan with the graph that it was made for"
            )
    move = estimated(devices, precision, optimizer_states)
    subdags_of = [stages_at(pipeline.cuts)[0] for pipeline in plan.pipelines]
    peers = [stage.peer for pipeline in plan.pipelines for stage in pipeline.stages]
    again = repeated(chain.from_iterable(subdags_of), peers)
    pipelines = []
    holders: dict[str, list[tuple[int, int]]] = {}
    weight_bytes: dict[str, int] = {}
    for number, pipeline in enumerate(plan.pipelines):
        subdags, costs, edges = stages_at(pipeline.cuts)
        loads = []
        here, again = again[: len(subdags)], again[len(subdags) :]
        for stage, subdag, cost, known in zip(pipeline.stages, subdags, costs, here, strict=True):
            given = StageLoad(
                peer=stage.peer,
                forward_s=stage.predicted.forward_s,
                backward_s=stage.predicted.backward_s,
                in_flight=stage.in_flight,
                repeated_bytes=known.trainable,
                state_bytes=(1 + optimizer_states) * cost.trainable_bytes + cost.other_bytes,
                memory_bytes=stage.predicted.memory_bytes,
                cost=cost,
            )
            loads.append(move(given, stage.peer))
            for weight in subdag.weights:
                place = number, stage.stage
                if weight.trainable and place not in holders.setdefault(weight.key, []):
                    holders[weight.key].append(place)
                    weight_bytes[weight.key] = type_bytes(weight.type, plan.sizes)
        pipelines.append(PipelineLoad(tuple(loads), edges, pipeline.microbatches))
    grouped: dict[tuple[tuple[int, int], ...], int] = {}
    for key, places in holders.items():
        grouped[tuple(places)] = grouped.get(tuple(places), 0) + weight_bytes[key]
    return Workload(
        pipelines=tuple(pipelines),
        groups=tuple(WeightGroup(places, size_bytes) for places, size_bytes in grouped.items()),
        driver=plan.owner,
        state_copies=1 + optimizer_states,
        move=move,
    )
