"""Evaluation graphs: captured where evaluation mode differs, cut with the training graph, and checked like it."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from fusionai.errors import GraphError
from fusionai.graph.capture import Captured, capture
from fusionai.graph.capture.dtypes import TORCH_DTYPES
from fusionai.graph.capture.interpreter import interpret
from fusionai.graph.cuts import cut
from fusionai.graph.dependencies import local_nodes
from fusionai.graph.encoding import content_hash, decode, decode_subdag, encode, encode_subdag
from fusionai.graph.evaluation import evaluated, face
from fusionai.graph.model import EvaluationGraph, OpDag, Ref, SubDag, TensorType, ValueName
from fusionai.graph.privacy import arrange_private, raw_values
from fusionai.graph.structure import structure
from fusionai.graph.verify import verify
from two_faced_models import (
    DIFFERENT,
    ROLES,
    SAME,
    WIDTH,
    AlwaysBatchStatistics,
    AuxiliaryHead,
    LayerDropped,
    Net,
    Normalising,
    OtherLoss,
    Reversed,
    Skipping,
    StochasticDepth,
    batch,
)

torch.set_num_threads(1)


@cache
def captured(kind: type[Net]) -> Captured:
    return capture(kind(), batch(0), roles=ROLES)  # type: ignore[arg-type]


def graph_of(kind: type[Net]) -> OpDag:
    return captured(kind).graph


def loss_of(graph: OpDag, given: Captured, inputs: dict[str, Tensor]) -> float:
    """The loss that a graph computes as it stands, on copies of its weights."""
    weights = {}
    for weight in graph.weights:
        data = given.read(weight.key)
        flat = torch.frombuffer(bytearray(data.data), dtype=TORCH_DTYPES[data.dtype])
        weights[weight.name] = flat.reshape(data.shape)
    return float(interpret(graph, inputs, weights))


@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_evaluation_is_captured(kind: type[Net]) -> None:
    graph = graph_of(kind)
    assert graph.evaluation is not None
    verify(graph)
    assert decode(encode(graph)) == graph
    inputs = batch(1, rows=3, length=7)
    expected = kind().eval()(**inputs).detach()
    assert loss_of(evaluated(graph), captured(kind), inputs) == pytest.approx(float(expected), rel=1e-6)
    for weight in graph.evaluation.weights:
        assert not weight.trainable


@pytest.mark.parametrize("kind", SAME)
def test_the_same_evaluation_changes_nothing(kind: type[Net]) -> None:
    graph = graph_of(kind)
    assert graph.evaluation is None
    assert b"evaluation" not in encode(graph)
    alone = capture(kind(), batch(0), roles=ROLES, evaluation=False).graph  # type: ignore[arg-type]
    assert content_hash(graph) == content_hash(alone)


def test_capture_leaves_the_module_as_it_was() -> None:
    for kind in (Normalising, AlwaysBatchStatistics):
        net = kind()
        modes = [each.training for each in net.modules()]
        before = copy.deepcopy(net.state_dict())
        capture(net, batch(0), roles=ROLES)  # type: ignore[arg-type]
        assert [each.training for each in net.modules()] == modes
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class DeepStochasticDepth(StochasticDepth):
    """Seven equal layers, of which evaluation treats one otherwise."""

    def prepare(self) -> None:
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(7)])

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        hidden = super().step(number, hidden, layer)
        return hidden if self.training or number != 5 else hidden * 3


def test_layers_that_are_traced_once_may_differ_in_evaluation() -> None:
    full = capture(DeepStochasticDepth(), batch(0), roles=ROLES, repeats=False)  # type: ignore[arg-type]
    short = capture(DeepStochasticDepth(), batch(0), roles=ROLES)  # type: ignore[arg-type]
    assert full.graph == short.graph
    inputs = batch(1, rows=3, length=7)
    expected = DeepStochasticDepth().eval()(**inputs).detach()
    assert loss_of(evaluated(short.graph), short, inputs) == pytest.approx(float(expected), rel=1e-6)


def test_capture_counts_no_batch_of_many_layers() -> None:
    class Deep(Net):
        def prepare(self) -> None:
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(WIDTH)) for _ in range(6)])

        def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
            moved: Tensor = layer(hidden.transpose(1, 2)).transpose(1, 2)
            return moved

    net = Deep()
    example = {name: tensor.expand(3, 10) for name, tensor in batch(0, rows=1).items()}
    lengths = {"tokens": {0: "batch"}, "labels": {0: "batch"}}
    before = copy.deepcopy(net.state_dict())
    capture(net, example, roles=ROLES, dynamic=lengths)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_dropout_that_stays_on_is_evaluated() -> None:
    class MonteCarlo(Net):
        def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
            return nn.functional.dropout(super().step(number, hidden, layer), 0.1, training=True)

    graph = capture(MonteCarlo(), batch(0), roles=ROLES).graph  # type: ignore[arg-type]
    assert graph.evaluation is not None
    assert sum(node.op == "aten.dropout.default" for node in graph.evaluation.nodes) == 4


def test_an_eval_that_merges_weights_is_refused() -> None:
    class Merging(Net):
        def eval(self) -> Net:
            self.head.weight.data += 1
            return self

    net = Merging()
    before = net.head.weight.detach().clone()
    with pytest.raises(GraphError, match=r"Merging.eval\(\) writes to a tensor of the module.*without held-out data"):
        capture(net, batch(0), roles=ROLES)  # type: ignore[arg-type]
    assert torch.equal(net.head.weight, before)
    assert capture(net, batch(0), roles=ROLES, evaluation=False).graph.evaluation is None  # type: ignore[arg-type]


def test_an_evaluation_that_cannot_be_captured_says_so() -> None:
    class NoLoss(Net):
        def leave(self, hidden: Tensor, labels: Tensor) -> Tensor:
            return super().leave(hidden, labels) if self.training else self.head(hidden)

    with pytest.raises(GraphError, match=r"in evaluation mode NoLoss cannot be captured.*without held-out data"):
        capture(NoLoss(), batch(0), roles=ROLES)  # type: ignore[arg-type]
    capture(NoLoss(), batch(0), roles=ROLES, evaluation=False)  # type: ignore[arg-type]


# --- cuts -------------------------------------------------------------------------------------------------------


def cuts_of(graph: OpDag, stages: int) -> list[int]:
    """Positions that part the layers of `Net`: before linear products, evenly."""
    linears = [place for place, node in enumerate(graph.nodes) if node.op == "aten.linear.default"]
    return [linears[number * len(linears) // stages] for number in range(1, stages)]


@pytest.mark.parametrize("kind", DIFFERENT)
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_together_are_the_evaluation(kind: type[Net], stages: int) -> None:
    graph = graph_of(kind)
    own = graph.evaluation
    assert own is not None
    subdags = cut(graph, cuts_of(graph, stages))
    training = cut(msgspec.structs.replace(graph, evaluation=None), cuts_of(graph, stages))
    parts = [face(subdag, train=False) for subdag in subdags]
    assert len(parts) == stages
    for subdag, alone in zip(subdags, training, strict=True):
        assert decode_subdag(encode_subdag(subdag)) == subdag
        assert face(subdag, train=True) is subdag
        assert msgspec.structs.replace(subdag, evaluation=None, weights=alone.weights) == alone
        assert set(alone.weights) <= set(subdag.weights)
    local = local_nodes(evaluated(graph))
    fixed = {own.nodes[place].name for place in local}
    run = [node.name for part in parts for node in part.nodes if node.name not in fixed]
    assert sorted(run) == sorted(node.name for node in own.nodes if node.name not in fixed)
    assert [part.loss for part in parts if part.loss is not None] == [own.loss]
    sent = {(each.value, each.source, each.target) for part in parts for each in part.sends}
    assert sent == {(each.value, each.source, each.target) for part in parts for each in part.receives}
    assert not any(each.gradient for part in parts for each in part.sends)
    held = {weight.key for subdag in subdags for weight in subdag.weights}
    assert held == {weight.key for weight in evaluated(graph).weights}


def test_what_training_computes_too_runs_in_the_same_stage() -> None:
    graph = graph_of(OtherLoss)
    subdags = cut(graph, cuts_of(graph, 4))
    trained, own = structure(graph, inference=True), structure(evaluated(graph), inference=False)
    stage_of = {trained.values[node.name]: subdag.index for subdag in subdags for node in subdag.nodes}  # type: ignore[index]
    for subdag in subdags:
        for node in face(subdag, train=False).nodes:
            assert stage_of.get(own.values[node.name], 3) == subdag.index  # type: ignore[index]


def test_a_tensor_may_go_where_training_sends_none() -> None:
    subdags = cut(graph_of(Skipping), cuts_of(graph_of(Skipping), 4))

    def pairs(train: bool) -> set[tuple[int, int]]:
        return {(each.source, each.target) for subdag in subdags for each in face(subdag, train).sends}

    assert pairs(train=False) - pairs(train=True)


def test_a_weight_of_evaluation_only_is_held_once() -> None:
    subdags = cut(graph_of(LayerDropped), cuts_of(graph_of(LayerDropped), 4))
    holders = [subdag.index for subdag in subdags if "calibration" in {weight.key for weight in subdag.weights}]
    assert len(holders) == 1


def test_weights_that_evaluation_needs_later_are_tied() -> None:
    """In the opposite order a layer runs after layers of later stages: those stages hold its weights too."""
    subdags = cut(graph_of(Reversed), cuts_of(graph_of(Reversed), 2))
    keys = [{weight.key for weight in subdag.weights} for subdag in subdags]
    assert {"layers.0.weight", "layers.1.weight"} <= keys[0] & keys[1]
    assert all(weight.trainable for subdag in subdags for weight in subdag.weights)


def test_a_buffer_that_changes_is_not_parted() -> None:
    graph = graph_of(AlwaysBatchStatistics)
    for stages in (2, 3, 4):
        subdags = cut(graph, cuts_of(graph, stages))
        assert sum("mean" in {weight.key for weight in subdag.weights} for subdag in subdags) == 1


# --- private jobs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIFFERENT)
def test_raw_data_stays_with_the_owner_in_evaluation(kind: type[Net]) -> None:
    graph = graph_of(kind)
    arranged, front, back = arrange_private(graph)
    verify(arranged)
    assert arrange_private(arranged) == (arranged, front, back)
    own = arranged.evaluation
    assert own is not None
    assert all(earlier <= later for earlier, later in pairwise(own.places))
    stages = [face(each, train=False) for each in cut(arranged, [front, (front + back) // 2, back])]
    private = {item.name for item in arranged.inputs if item.private}
    for stage in stages[1:-1]:
        assert not {item.name for item in stage.inputs} & private
        assert all(each.type.dtype == "float32" for each in stage.receives)
        assert stage.loss is None
    assert not any(
        node.op == "aten.linear.default" and node.scope == "head" for part in stages[:-1] for node in part.nodes
    )
    assert stages[-1].loss == own.loss


def test_raw_data_in_the_middle_of_evaluation_is_refused() -> None:
    class Looking(Net):
        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            hidden = self.embedding(tokens)
            for number, layer in enumerate(self.layers):
                hidden = self.step(number, hidden, layer)
                if number == 1 and not self.training:
                    hidden = hidden * tokens.unsqueeze(-1)
            return self.leave(hidden, labels)

    graph = capture(Looking(), batch(0), roles=ROLES).graph  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"in evaluation mode operator 'mul_.*reads raw inputs in the middle"):
        arrange_private(graph)


# --- graphs of strangers ----------------------------------------------------------------------------------------


def changed(graph: OpDag, **fields: Any) -> OpDag:
    assert graph.evaluation is not None
    return msgspec.structs.replace(graph, evaluation=msgspec.structs.replace(graph.evaluation, **fields))


def hostile(own: EvaluationGraph) -> dict[str, dict[str, Any]]:
    first, *others = own.nodes
    further = msgspec.structs.replace(own.weights[0], trainable=True)
    return {
        "must rise": {"places": (*own.places[:-1], 10**9)},
        "must rise within": {"places": (-1, *own.places[1:])},
        "must rise ": {"places": (own.places[-1], *own.places[1:])},
        "places of": {"places": own.places[1:]},
        "trainable, but only evaluation reads it": {"weights": (further,)},
        "not in vocabulary": {"nodes": (msgspec.structs.replace(first, op="aten.set_.source_Tensor"), *others)},
        "which nothing before it makes": {"nodes": (*others, first)},
        "has no type": {"types": {}},
        "defined twice": {"weights": (own.weights[0], own.weights[0])},
        "no node makes the loss": {"loss": ValueName("tokens")},
        "negative size": {"types": {**own.types, first.outputs[0]: TensorType("float32", (-1,))}},
        "missing": {"nodes": (msgspec.structs.replace(first, args=()), *others)},
    }


@pytest.mark.parametrize("text", hostile(msgspec.structs.replace(graph_of(LayerDropped)).evaluation))  # type: ignore[arg-type]
def test_hostile_evaluation_graphs(text: str) -> None:
    graph = graph_of(LayerDropped)
    assert graph.evaluation is not None
    bad = changed(graph, **hostile(graph.evaluation)[text])
    with pytest.raises(GraphError, match=text.strip()):
        decode(encode(bad))


def test_an_absent_evaluation_is_not_spelled_out() -> None:
    text = encode(graph_of(Net))
    with pytest.raises(GraphError, match="canonical"):
        decode(text.replace(b'"inputs":', b'"evaluation":null,"inputs":', 1))


def test_hostile_stages() -> None:
    subdag = cut(graph_of(Skipping), cuts_of(graph_of(Skipping), 4))[1]
    own = subdag.evaluation
    assert own is not None

    def refused(text: str, **fields: Any) -> None:
        bad: SubDag = msgspec.structs.replace(subdag, evaluation=msgspec.structs.replace(own, **fields))
        with pytest.raises(GraphError, match=text):
            decode_subdag(encode_subdag(bad))

    transfer = own.receives[0]
    refused("another stage", receives=(msgspec.structs.replace(transfer, target=3),))
    refused("goes from stage 2 to 1", receives=(msgspec.structs.replace(transfer, source=2),))
    refused("said to have a gradient", receives=(msgspec.structs.replace(transfer, gradient=True),))
    refused("which nothing before it makes", receives=())
    unknown = msgspec.structs.replace(own.nodes[0], args=(Ref(ValueName("elsewhere")),))
    refused("aten|elsewhere", nodes=(unknown, *own.nodes[1:]))


def test_a_head_of_training_only_leaves_a_stage_without_evaluation() -> None:
    graph = graph_of(AuxiliaryHead)
    place = next(p for p, node in enumerate(graph.nodes) if node.scope == "auxiliary")
    subdags = cut(graph, [place, place + 1]) if 0 < place < len(graph.nodes) - 1 else cut(graph, [])
    assert any(not face(subdag, train=False).nodes for subdag in subdags)


def test_evaluation_on_another_input_is_another_computation() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)
            self.scales = [torch.full((4,), 1.0), torch.full((4,), 3.0)]

        def forward(self, plain: Tensor, changed: Tensor, y: Tensor) -> Tensor:
            hidden = self.layer(changed if self.training else plain)
            return nn.functional.mse_loss(hidden * self.scales[0 if self.training else 1], y)

    drawn = torch.Generator().manual_seed(1)
    example = {name: torch.randn(6, 4, generator=drawn) for name in ("plain", "changed", "y")}
    assert capture(Views(), example, roles={"y": "labels"}).graph.evaluation is not None


@pytest.mark.parametrize("writing", ["training", "evaluation"])
@pytest.mark.parametrize("source", ["tokens", "labels"])
def test_a_buffer_of_one_mode_shows_raw_data_in_the_other(writing: str, source: str) -> None:
    """Whatever reads it there stays with the owner, or the private job is refused; sent it is never."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.register_buffer("seen", torch.zeros(2, 5))

        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            hidden = self.embedding(tokens)
            if self.training == (writing == "training"):
                self.seen.copy_((tokens if source == "tokens" else labels).float())
            else:
                hidden = hidden + (self.seen * 2).unsqueeze(-1)
            for layer in self.layers:
                hidden = torch.tanh(layer(hidden))
            return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())

    ids = torch.randint(0, 9, (2, 5))
    example = {"tokens": ids, "labels": ids.clone()}
    sizes: dict[str, dict[int, str]] = {"tokens": {}, "labels": {}}
    graph = capture(Remembering(), example, roles={"tokens": "tokens"}, dynamic=sizes).graph
    assert graph.evaluation is not None
    assert "w_seen" in raw_values(graph, train=writing != "training")
    try:
        arranged, front, back = arrange_private(graph)
    except GraphError as error:
        if "seen" in str(error) or "reads raw inputs" in str(error):
            return
        raise
    middle = cut(arranged, [front, back])[1]
    for train in (True, False):
        part = face(middle, train)
        taken = {*(each.value for each in part.receives), *(each.name for each in (*part.inputs, *part.weights))}
        assert taken.isdisjoint(raw_values(arranged, train=train))
