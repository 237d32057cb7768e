"""Costs of a graph that is cut many times are the costs, and what only looks alike is told apart."""

from __future__ import annotations

import msgspec
import pytest
from decoder_graph import SIZES, decoder

from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import Cutter, cut, cut_points
from fusionai.graph.graph_costs import Likeness


@pytest.mark.parametrize("tied", [False, True])
def test_every_stage_costs_what_it_costs_by_itself(tied: bool) -> None:
    graph = decoder(8, tied=tied)
    points = cut_points(graph, SIZES)
    cutter = Cutter(graph)
    costs = cutter.costs(SIZES)
    for places in (points, points[::2], points[1::3], points[:1], []):
        subdags = cutter.cut(list(places))
        assert costs.stages(subdags) == [stage_cost(each, SIZES) for each in subdags]
    # Layers repeat, so far fewer were costed than asked for.
    assert len(costs) < len(points)
    assert cutter.costs(SIZES) is costs
    assert costs.whole == stage_cost(cut(graph, [])[0], SIZES)
    other = {symbol: 2 * size for symbol, size in SIZES.items()}
    assert cutter.costs(other).whole == stage_cost(cut(graph, [])[0], other)


def test_numbers_that_are_equal_are_not_alike() -> None:
    subdag = cut(decoder(1), [])[0]
    keys, likeness = set(), Likeness()
    for place, number in enumerate((1, 1.0, True, 2, 1)):
        first, *others = subdag.nodes
        changed = msgspec.structs.replace(first, name=f"{first.name}.{place}", args=(*first.args, number))
        keys.add(likeness(msgspec.structs.replace(subdag, nodes=(changed, *others))))
    assert len(keys) == 4


def test_what_travels_and_what_trains_counts() -> None:
    graph = decoder(4)
    subdag = cut(graph, cut_points(graph, SIZES))[1]
    frozen = tuple(msgspec.structs.replace(each, trainable=False) for each in subdag.weights)
    variants = [
        subdag,
        msgspec.structs.replace(subdag, weights=frozen),
        msgspec.structs.replace(subdag, sends=()),
        msgspec.structs.replace(
            subdag, receives=tuple(msgspec.structs.replace(each, gradient=False) for each in subdag.receives)
        ),
    ]
    assert subdag.weights
    assert subdag.sends
    assert subdag.receives
    likeness = Likeness()
    assert len({likeness(each) for each in variants}) == 4
