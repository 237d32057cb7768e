"""Planning problems of small pools, and what holds of every plan of theirs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from decoder_graph import GB, SIZES, decoder, member, pool

from fusionai.graph.cuts import cut
from fusionai.graph.model import OpDag
from fusionai.graph.privacy import arrange_private
from fusionai.scheduling.links import LinkModel, PoolLinks
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.segments import MEMORY_MARGIN, reachable

OWNER = member("owner", gflops=400.0)


@dataclass(frozen=True)
class TwoCities:
    """Fast links within each half of the machines, one slow bridge between the halves."""

    count: int
    near_bytes_per_s: float = 1e9
    far_bytes_per_s: float = 2e5

    def _near(self, sources: Any, targets: Any) -> Any:
        return (np.asarray(sources) < self.count // 2) == (np.asarray(targets) < self.count // 2)

    def bandwidths_bytes_per_s(self, sources: Any, targets: Any) -> Any:
        return np.where(self._near(sources, targets), self.near_bytes_per_s, self.far_bytes_per_s)

    def rtts_s(self, sources: Any, targets: Any) -> Any:
        return np.where(self._near(sources, targets), 1e-4, 2e-2)


def task_of(
    graph: OpDag,
    members: Sequence[Member],
    *,
    links: LinkModel | None = None,
    microbatches: int = 16,
    private: bool = False,
    owner: Member | None = None,
    rtt_s: float = 1e-4,
    bytes_per_s: float = 1e9,
) -> TrainingProblem:
    front, back = 0, len(graph.nodes)
    if private:
        owner = owner or OWNER
        graph, front, back = arrange_private(graph)
    everyone = [*members, *([owner] if owner else [])]
    alike = PoolLinks(
        pool(*members, owner=owner, rtt_s=rtt_s, bytes_per_s=bytes_per_s), [each.peer for each in everyone]
    )
    return TrainingProblem(
        graph=graph,
        graph_hash="hash",
        sizes=SIZES,
        microbatches=microbatches,
        optimizer_states=2,
        precision="fp32",
        members=tuple(members),
        owner=owner,
        links=links or alike,
        privacy="private" if private else "open",
        front=front,
        back=back,
    )


def scarce(seed: int, machines: int, layers: int, *, tied: bool = False) -> SegmentCosts:
    """Return the costs of segments on machines of mixed speed whose memory holds a few microbatches, in two cities."""
    draw = random.Random(seed)
    members = [
        member(f"m{k}", gflops=draw.choice((40.0, 160.0)), memory_bytes=draw.choice((6, 12)) * 10**6, device="cuda:0")
        for k in range(machines)
    ]
    links = TwoCities(machines, far_bytes_per_s=10 ** draw.uniform(6, 8))
    return costs_in_segments(task_of(decoder(layers, tied=tied), members, links=links, microbatches=24))


def check(task: TrainingProblem, made: Plan) -> None:
    """What holds of every plan."""
    known = {each.peer: each for each in task.machines}
    owner = task.owner.peer if task.pinned and task.owner else ""
    used = [stage.peer for pipeline in made.pipelines for stage in pipeline.stages if stage.peer != owner]
    assert len(used) == len(set(used))
    assert set(used) | set(made.left_out) == {each.peer for each in task.members}
    assert sum(pipeline.microbatches for pipeline in made.pipelines) == task.microbatches
    for pipeline in made.pipelines:
        assert pipeline.microbatches >= 1
        bounds = [pipeline.stages[0].start, *(stage.stop for stage in pipeline.stages)]
        assert bounds == sorted(set(bounds))
        assert (bounds[0], bounds[-1]) == (0, len(task.graph.nodes))
        assert list(pipeline.cuts) == bounds[1:-1]
        assert len(cut(task.graph, pipeline.cuts)) == len(pipeline.stages)
        held = [stage.in_flight for stage in pipeline.stages]
        assert held == sorted(held, reverse=True)
        for stage in pipeline.stages:
            assert stage.predicted.memory_bytes * MEMORY_MARGIN <= known[stage.peer].device.memory_bytes
        for one, other in itertools.pairwise(pipeline.stages):
            assert reachable(known[one.peer], known[other.peer])
        if task.pinned:
            assert pipeline.stages[0].peer == pipeline.stages[-1].peer == owner
            assert pipeline.cuts[0] == task.front
            assert pipeline.cuts[-1] == task.back
    slowest_s = max(pipeline.predicted_s for pipeline in made.pipelines)
    assert made.predicted_step_s == pytest.approx(slowest_s + made.end_of_step_s)
    assert made.bound_step_s <= made.predicted_step_s * (1 + 1e-9)


def small_task(seed: int) -> TrainingProblem:
    draw = random.Random(seed)
    members = [member(f"m{k}", gflops=draw.uniform(20, 200), memory_bytes=GB) for k in range(draw.randint(2, 3))]
    links = {
        f"{one.peer}>{other.peer}": LinkProfile(10 ** draw.uniform(-4, -2), 10 ** draw.uniform(6, 9.5))
        for one, other in itertools.permutations(members, 2)
    }
    known = PoolLinks(Pool(tuple(members), links), [each.peer for each in members])
    return task_of(decoder(draw.choice((1, 2))), members, links=known, microbatches=draw.choice((1, 2, 4)))
