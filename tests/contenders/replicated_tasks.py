"""Tasks of a decoder on machines whose links are alike, or as given, for the tests of replicated stages."""

from __future__ import annotations

import itertools

from decoder_graph import SIZES, member

from fusionai.graph.model import OpDag
from fusionai.graph.privacy import arrange_private
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Member, Pool


def task(
    members: list[Member],
    graph: OpDag,
    *,
    microbatches: int = 16,
    bytes_per_s: float = 1e9,
    links: dict[str, LinkProfile] | None = None,
    private: bool = False,
) -> TrainingProblem:
    owner = member("owner") if private else None
    everyone = [*members, *([owner] if owner else [])]
    alike = {
        f"{one.peer}>{other.peer}": LinkProfile(1e-3, bytes_per_s) for one, other in itertools.permutations(everyone, 2)
    }
    front, back = 0, len(graph.nodes)
    if private:
        graph, front, back = arrange_private(graph)
    return TrainingProblem(
        graph=graph,
        graph_hash="hash",
        sizes=SIZES,
        microbatches=microbatches,
        optimizer_states=2,
        precision="fp32",
        members=tuple(members),
        owner=owner,
        links=PoolLinks(Pool(tuple(everyone), links or alike), [each.peer for each in everyone]),
        privacy="private" if private else "open",
        front=front,
        back=back,
    )
