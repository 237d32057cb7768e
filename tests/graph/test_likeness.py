"""Costs by likeness are the costs, and what only looks alike is told apart."""

from __future__ import annotations

from collections.abc import Hashable

import msgspec
import pytest
from decoder_graph import SIZES, decoder

from fusionai.graph.cost import StageCost, stage_cost
from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.likeness import likeness, stage_costs


@pytest.mark.parametrize("tied", [False, True])
def test_every_stage_costs_what_it_costs_by_itself(tied: bool) -> None:
    graph = decoder(8, tied=tied)
    points = cut_points(graph, SIZES)
    known: dict[Hashable, StageCost] = {}
    for places in (points, points[::2], points[1::3], points[:1], []):
        subdags = cut(graph, list(places))
        assert stage_costs(subdags, SIZES, known) == [stage_cost(each, SIZES) for each in subdags]
    # Layers repeat, so far fewer were costed than asked for.
    assert len(known) < len(points)


def test_numbers_that_are_equal_are_not_alike() -> None:
    subdag = cut(decoder(1), [])[0]
    keys = set()
    for number in (1, 1.0, True, 2):
        first, *others = subdag.nodes
        changed = msgspec.structs.replace(first, args=(*first.args, number))
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
    assert len({likeness(each) for each in variants}) == 4
