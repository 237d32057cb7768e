"""Costs of a graph that is cut many times are the costs, and what only looks alike is told apart."""

from __future__ import annotations

import msgspec
import pytest
from decoder_graph import SIZES, decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from language_graphs import captured_language_model, llama_graph
from random_dags import dags

from fusionai.errors import GraphError
from fusionai.graph.calls import StageCalls
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import Cutter, cut, cut_points
from fusionai.graph.graph_costs import Likeness
from fusionai.graph.model import Input, Node, OpDag, Ref, TensorType, ValueName, Weight, WeightKey
from fusionai.graph.vocabulary import VOCABULARY_VERSION


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


@given(dags(), st.data())
@settings(max_examples=100, deadline=None)
def test_stages_of_any_graph_cost_what_they_cost_by_themselves(graph: OpDag, data: st.DataObject) -> None:
    """Weights that one stage reads and another trains, values that arrive and lead nowhere, results that are views."""
    positions = sorted(data.draw(st.sets(st.integers(1, len(graph.nodes) - 1), max_size=3)))
    cutter, sizes = Cutter(graph), {"n": 4}
    try:
        subdags = cutter.cut(positions)
    except GraphError:
        return
    assert cutter.costs(sizes).stages(subdags) == [stage_cost(each, sizes) for each in subdags]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
def test_stages_cut_anywhere_cost_what_they_cost_by_themselves(kind: str) -> None:
    """Not at cut points only: within attention what crosses is permuted, and the views of it are told from copies."""
    graph = llama_graph(2, tied=True) if kind == "llama" else captured_language_model(kind).graph
    sizes = {symbol: (2, 16)[axis] for symbol, (_, axis) in graph.symbols.items()}
    cutter = Cutter(graph)
    for position in range(1, len(graph.nodes), 3):
        try:
            subdags = cutter.cut([position])
        except GraphError:
            continue
        assert cutter.costs(sizes).stages(subdags) == [stage_cost(each, sizes) for each in subdags], position


def test_a_value_may_need_a_gradient_in_one_stage_only() -> None:
    """It arrives from where the loss depends on it, and leads to nothing here: what is bound for the whole differs."""
    hidden, name = TensorType("float32", ("n", 8)), ValueName
    weights = tuple(
        Weight(name(f"w{k}"), WeightKey(f"w{k}"), TensorType("float32", (8, 8)), "parameter", True) for k in range(3)
    )

    def linear(source: str, weight: str, output: str) -> Node:
        taken = Ref(name(source)), Ref(name(weight))
        return Node(output, "aten.linear.default", taken, {}, (name(output),))

    loss = Node("loss", "aten.mse_loss.default", (Ref(name("last")), Ref(name("y"))), {}, (name("loss"),))
    nodes = linear("x", "w0", "first"), linear("first", "w1", "last"), linear("first", "w2", "unused"), loss
    types = {name(each): hidden for each in ("first", "last", "unused")} | {name("loss"): TensorType("float32", ())}
    inputs = Input(name("x"), hidden, "data", True), Input(name("y"), hidden, "labels", True)
    graph = OpDag(VOCABULARY_VERSION, "parted", {"n": (name("x"), 0)}, inputs, weights, nodes, types, loss=name("loss"))
    whole, second = cut(graph, [])[0], cut(graph, [2])[1]
    apart = StageCalls(second, {"n": 4})
    taken = StageCalls(second, {"n": 4}, StageCalls(whole, {"n": 4}))
    assert [each.call for each in taken.calls] == [each.call for each in apart.calls]
    assert taken.graded == apart.graded
    assert not taken.calls[0].call.tensor("input").needs_gradient


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
