from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from language_graphs import llama_graph
from random_dags import NUMPY, dags, execute, feeds, with_gradients

from fusionai.errors import GraphError
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import boundary_bytes, crossing_bytes, cut, cut_points
from fusionai.graph.dependencies import gradient_values, local_nodes, producers
from fusionai.graph.encoding import decode_subdag, encode_subdag
from fusionai.graph.model import OpDag, ValueName
from fusionai.graph.verify import verify

ROWS = 4


@given(dags(), st.data())
@settings(max_examples=150, deadline=None)
def test_stages_in_order_equal_the_whole(graph: OpDag, data: st.DataObject) -> None:
    verify(graph)
    positions = sorted(data.draw(st.sets(st.integers(1, len(graph.nodes) - 1), max_size=3)))
    own = [set(range(early, late)) - local_nodes(graph) for early, late in pairwise([0, *positions, len(graph.nodes)])]
    if not all(own):
        with pytest.raises(GraphError, match="would compute nothing"):
            cut(graph, positions)
        return
    values = feeds(graph, ROWS)
    whole = execute(graph.nodes, values, ROWS, NUMPY)
    subdags = cut(graph, positions)
    sent: dict[tuple[ValueName, int], object] = {}
    for subdag in subdags:
        assert decode_subdag(encode_subdag(subdag)) == subdag
        given_here = {item.name: values[item.name] for item in (*subdag.inputs, *subdag.weights)}
        given_here |= {each.value: sent.pop((each.value, subdag.index)) for each in subdag.receives}
        made = execute(subdag.nodes, given_here, ROWS, NUMPY)
        for each in subdag.sends:
            assert (each.value, each.target) not in sent
            sent[each.value, each.target] = made[each.value]
        if subdag.loss is not None:
            np.testing.assert_array_equal(made[subdag.loss], whole[graph.loss])
    assert not sent
    assert [subdag.index for subdag in subdags if subdag.loss] == [len(subdags) - 1]


@given(dags())
@settings(max_examples=100, deadline=None)
def test_gradient_values_are_those_of_autograd(graph: OpDag) -> None:
    assert gradient_values(graph) == with_gradients(graph, ROWS) - (
        {graph.loss} if graph.loss not in gradient_values(graph) else set()
    )


@given(dags(), st.data())
@settings(max_examples=100, deadline=None)
def test_crossing_bytes_are_those_of_a_cut_there(graph: OpDag, data: st.DataObject) -> None:
    position = data.draw(st.integers(1, len(graph.nodes) - 1))
    sizes = {"n": ROWS}
    try:
        subdags = cut(graph, [position])
    except GraphError:
        return
    distinct = {each.value: each.type for each in subdags[0].sends}
    columns = {("n", 3): 3, ("n", 1): 1, (): 0}
    expected = sum(4 * (ROWS * columns[type.shape] if type.shape else 1) for type in distinct.values())
    assert crossing_bytes(graph, sizes)[position] == expected
    assert boundary_bytes(subdags, sizes).get((0, 1), (0, 0))[0] == expected


def test_refuses_positions_that_do_not_rise() -> None:
    graph = llama_graph(layers=2)
    for positions in ([0], [len(graph.nodes)], [20, 20], [30, 20]):
        with pytest.raises(GraphError, match="must rise strictly"):
            cut(graph, positions)


def test_cut_points_are_between_blocks_first() -> None:
    """A deep model is cut where one hidden state crosses, and nowhere else."""
    graph = llama_graph(layers=24)
    sizes = {"s0": 2, "s1": 128}
    hidden_bytes = 2 * 128 * 64 * 4
    points, crossing = cut_points(graph, sizes), crossing_bytes(graph, sizes)
    assert {crossing[point] for point in points} == {hidden_bytes}
    assert 24 <= len(points) <= 60
    stages = cut(graph, points)
    assert all(stage.nodes for stage in stages)


def test_shallow_models_can_still_be_balanced() -> None:
    graph = llama_graph(layers=1)
    assert len(cut_points(graph, {"s0": 2, "s1": 128})) >= 4


def test_rotary_tables_and_masks_do_not_travel() -> None:
    graph = llama_graph(layers=4)
    crossing = crossing_bytes(graph, {"s0": 1, "s1": 8})
    point = min(range(len(graph.nodes) // 2, len(graph.nodes) - 20), key=lambda position: crossing[position])
    first, second = cut(graph, [point])
    assert len(first.sends) == 1
    assert {node.op for node in first.nodes} & {"aten.cos.default"} == {"aten.cos.default"}
    assert {node.op for node in second.nodes} & {"aten.cos.default"} == {"aten.cos.default"}
    assert [item.role for item in first.inputs if item.role == "positions"] == ["positions"]
    assert [item.role for item in second.inputs if item.role == "positions"] == ["positions"]


def test_tied_weights_keep_one_key_and_direct_transfers_skip_stages() -> None:
    graph = llama_graph(layers=4, tied=True)
    sizes = {"s0": 1, "s1": 8}
    points = cut_points(graph, sizes)
    thirds = [points[len(points) // 3], points[2 * len(points) // 3]]
    stages = cut(graph, thirds)
    holders = [stage.index for stage in stages if any("embed" in weight.key for weight in stage.weights)]
    assert holders == [0, 2]
    made = producers(graph.nodes)
    for stage in stages:
        for each in stage.receives:
            assert each.target == stage.index
            assert each in stages[each.source].sends
            assert made[each.value] < [*thirds, len(graph.nodes)][each.source]


def test_a_70b_graph_is_cut_in_seconds() -> None:
    graph = llama_graph(layers=80, hidden=8192)
    assert len(graph.nodes) > 2500
    sizes = {"s0": 1, "s1": 4096}
    started_s = time.process_time()
    points = cut_points(graph, sizes)
    stages = cut(graph, [points[len(points) * part // 8] for part in range(1, 8)])
    costs = [stage_cost(stage, sizes) for stage in stages]
    assert time.process_time() - started_s < 20
    assert len(costs) == 8
