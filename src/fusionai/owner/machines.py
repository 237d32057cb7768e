"""The machines of a plan, as the driver of its job sees them."""

from __future__ import annotations

from collections.abc import Mapping

from fusionai.graph.cuts import cut
from fusionai.graph.model import OpDag
from fusionai.network.identity import PeerId
from fusionai.scheduling.plan import Plan
from fusionai.training.machine import Machine


def machines_of(graph: OpDag, plan: Plan, names: Mapping[str, str]) -> list[Machine]:
    """Return the machines with their stages, in the order of the pipeline. `names` are by peer, for people."""
    subdags = cut(graph, plan.cuts)
    peers = [stage.peer for stage in plan.stages]
    return [
        Machine(
            PeerId(peer),
            names.get(peer, peer[:12]),
            tuple(subdag for subdag, holder in zip(subdags, peers, strict=True) if holder == peer),
        )
        for peer in dict.fromkeys(peers)
    ]
