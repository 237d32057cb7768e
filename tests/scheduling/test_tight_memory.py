"""Pools of equal machines that hardly hold a model: whoever fills them one after the other finds a plan, so both do."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from decoder_graph import SIZES, decoder, member, pool
from training_problems import problem_of

from fusionai.graph.cuts import Cutter, cut_points
from fusionai.graph.model import OpDag, Sizes
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import PlanLimits
from fusionai.scheduling.segments import MEMORY_MARGIN


class Needs:
    """What ranges between cut points take, really cut: one microbatch in flight, and one that the heap holds."""

    def __init__(self, graph: OpDag, sizes: Sizes) -> None:
        self._points, self._sizes = [0, *cut_points(graph, sizes), len(graph.nodes)], sizes
        self._cutter = Cutter(graph)
        self.parts = len(self._points) - 1

    def __call__(self, start: int, stop: int) -> int:
        ends = [self._points[place] for place in (start, stop) if 0 < place < self.parts]
        (cost,) = self._cutter.costs(self._sizes).stages([self._cutter.cut(ends)[1 if start else 0]])
        return cost.training_bytes(2, 2)


@pytest.mark.parametrize("seed", range(24))
def test_a_plan_is_found_where_there_is_hardly_room(seed: int) -> None:
    draw = random.Random(seed)
    graph = decoder(draw.choice((8, 16, 24, 40)), hidden=draw.choice((32, 64)), tied=draw.random() < 0.3)
    sizes = draw.choice((SIZES, {"b": 8, "t": 64}))
    need = Needs(graph, sizes)
    budget = max(need(place, place + 1) for place in range(need.parts)) * draw.uniform(1.0, 4.0)
    filled = start = 0
    while start < need.parts:
        fitting = [stop for stop in range(start + 1, need.parts + 1) if need(start, stop) <= budget]
        start = fitting[-1]
        filled += 1
    # Sums over segments may count more than a stage of them needs, seldom over a tenth.
    offer = int(1.15 * budget * MEMORY_MARGIN)
    machines = pool(*(member(f"m{k}", memory_bytes=offer) for k in range(filled)))
    problem = problem_of(graph, sizes=sizes, microbatches=draw.choice((1, 4, 16)))
    one = plan(problem.within(PlanLimits(most_pipelines=1)).on_pool(machines, member("owner")))
    links = PoolLinks(machines, [each.peer for each in machines.members])
    several = plan(replace(problem, members=machines.members, links=links))
    assert len(one.stages) <= filled
    assert [len(each.stages) for each in several.pipelines]
