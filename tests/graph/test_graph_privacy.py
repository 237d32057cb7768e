"""Private jobs: who reads raw data stays in front, the head and the loss behind, and the model is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_graphs import captured_language_model, captured_residual_net, llama_graph
from torch import Tensor, nn

from fusionai.errors import GraphError
from fusionai.graph.capture import capture
from fusionai.graph.cuts import cut
from fusionai.graph.dependencies import reads
from fusionai.graph.model import OpDag, SubDag
from fusionai.graph.privacy import arrange_private, raw_values
from fusionai.graph.verify import verify
from fusionai.tensor import FLOATING


def check(graph: OpDag) -> tuple[SubDag, ...]:
    """Arrange, cut and return the stages, with what must hold for every model checked."""
    arranged, front, back = arrange_private(graph)
    verify(arranged)
    assert sorted(node.name for node in arranged.nodes) == sorted(node.name for node in graph.nodes)
    middle = (front + back) // 2
    bounds = [position for position in (front, middle, back) if 0 < position < len(arranged.nodes)]
    stages = cut(arranged, bounds)
    private = {item.name for item in arranged.inputs if item.private}
    for stage in stages[1:-1] if front else stages[:-1]:
        assert not {item.name for item in stage.inputs} & private
        for each in stage.receives:
            assert each.type.dtype in FLOATING, each
        assert stage.loss is None
    for stage in stages[:-1]:
        for each in stage.sends:
            assert each.target == len(stages) - 1 or each.type.dtype in FLOATING
    assert stages[-1].loss == graph.loss
    return stages


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "mixtral", "gemma3_text"])
def test_language_models(kind: str) -> None:
    graph = captured_language_model(kind).graph
    arranged, front, back = arrange_private(graph)
    assert [node.op for node in arranged.nodes[:front] if "embedding" in node.op] == ["aten.embedding.default"]
    assert arranged.nodes[back].op == "aten.linear.default"
    stages = check(graph)
    sent = {each.type.shape[-1] for stage in stages[:-1] for each in stage.sends if len(each.type.shape) == 3}
    assert 256 not in sent, "logits travel"


def test_images() -> None:
    graph = captured_residual_net().graph
    arranged, front, back = arrange_private(graph)
    assert [node.op for node in arranged.nodes[:front]] == ["aten.conv2d.default"]
    assert [node.op for node in arranged.nodes[back:]] == ["aten.linear.default", "aten.cross_entropy_loss.default"]
    check(graph)


def test_arranging_again_changes_nothing() -> None:
    arranged, front, back = arrange_private(llama_graph(layers=3))
    assert arrange_private(arranged) == (arranged, front, back)


class Model(nn.Module):
    """An MLP on vectors whose parts tests replace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.head, self.other = nn.Linear(16, 4), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, data: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(self.enter(data)))))
        return self.leave(hidden, data, labels)

    def enter(self, data: Tensor) -> Tensor:
        return data

    def leave(self, hidden: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(hidden), labels)


def graph_of(model: nn.Module) -> OpDag:
    example: dict[str, Any] = {"data": torch.randn(4, 8), "labels": torch.randint(0, 3, (4,))}
    return capture(model.train(), example, private=["data", "labels"], validate_values=False).graph


def names(graph: OpDag) -> tuple[list[str], list[str]]:
    arranged, front, back = arrange_private(graph)
    check(graph)

    def short(op: str) -> str:
        return op.split(".")[1]

    return [short(node.op) for node in arranged.nodes[:front]], [short(node.op) for node in arranged.nodes[back:]]


def test_scaled_raw_data_is_still_raw() -> None:
    class Scaled(Model):
        def enter(self, data: Tensor) -> Tensor:
            return nn.functional.layer_norm(data * self.scale, (8,))

    front, behind = names(graph_of(Scaled()))
    assert front == ["mul", "layer_norm", "linear"]
    assert behind == ["linear", "cross_entropy_loss"]


def test_every_head_stays() -> None:
    class TwoHeads(Model):
        def leave(self, hidden: Tensor, data: Tensor, labels: Tensor) -> Tensor:
            one = nn.functional.cross_entropy(self.head(hidden), labels)
            return one + nn.functional.cross_entropy(self.other(hidden) * 2.0, labels)

    _, behind = names(graph_of(TwoHeads()))
    assert behind.count("linear") == 2


def test_a_loss_against_the_raw_data_is_behind() -> None:
    class AutoEncoder(Model):
        def leave(self, hidden: Tensor, data: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.mse_loss(self.head(hidden), data[:, :4]) + 0.0 * labels.sum()

    front, behind = names(graph_of(AutoEncoder()))
    assert "linear" in front
    assert "mse_loss" in behind
    assert "linear" in behind


def test_a_reader_in_the_middle_is_refused() -> None:
    class Skip(Model):
        def forward(self, data: Tensor, labels: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(data))
            hidden = self.second(hidden) * (data.sum(-1, keepdim=True) > 0)
            return self.leave(self.second(hidden), data, labels)

    with pytest.raises(GraphError, match="in the middle") as caught:
        arrange_private(graph_of(Skip()))
    assert 'privacy = "open"' in str(caught.value)
    assert "aten.mul.Tensor" in str(caught.value)


def test_a_model_with_nothing_in_between_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, data: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.layer(data), labels)

    with pytest.raises(GraphError, match="leaves nothing of 'Flat'"):
        arrange_private(graph_of(Flat()))


def test_stages_for_others_read_no_private_value() -> None:
    """Follow every value made of private inputs by hand: none but floating-point activations reaches the middle."""
    arranged, front, back = arrange_private(llama_graph(layers=2))
    shown = {item.name for item in arranged.inputs if item.private}
    for place, node in enumerate(arranged.nodes):
        touched = shown & set(reads(node))
        assert not (touched and front <= place < back)
        if touched:
            shown |= {output for output in node.outputs if arranged.types[output].dtype not in FLOATING}


# --- frozen weights, and weights that are made of others --------------------------------------------------------------


def frozen(model: nn.Module, *trained: str) -> nn.Module:
    """Freeze all weights but those whose names contain one of these."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(each in name for each in trained))
    return model


@pytest.mark.parametrize("trained", [("second", "head"), ("first", "second"), ("second",), ("head",)])
def test_frozen_weights_hide_and_weigh_as_much(trained: tuple[str, ...]) -> None:
    whole = arrange_private(graph_of(Model()))
    partly = arrange_private(graph_of(frozen(Model(), *trained)))
    assert partly[1:] == whole[1:]
    assert [node.op for node in partly[0].nodes] == [node.op for node in whole[0].nodes]


def test_buffers_do_not_hide_their_input() -> None:
    """A fixed projection may be anything: a filter bank, a permutation, the identity."""

    class Projected(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filters", torch.eye(8))

        def enter(self, data: Tensor) -> Tensor:
            return nn.functional.linear(data, self.get_buffer("filters"))

    front, _ = names(graph_of(Projected()))
    assert front == ["linear", "linear"]


class Encoded(Model):
    """A learned shift that does not depend on the data."""

    def enter(self, data: Tensor) -> Tensor:
        return data + torch.exp(self.scale)


def test_what_is_mixed_with_weights_alone_is_still_raw() -> None:
    front, _ = names(graph_of(Encoded()))
    assert front == ["exp", "add", "linear"]


class Penalised(Model):
    """Every weight is penalised in the loss."""

    def leave(self, hidden: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        penalty = sum((weight.square().sum() for weight in self.parameters()), torch.zeros(()))
        return super().leave(hidden, data, labels) + 1e-3 * penalty


def held_by(graph: OpDag) -> tuple[set[str], set[str]]:
    """Return the trained weights of the owner's stages, and those of compnodes."""
    arranged, front, back = arrange_private(graph)
    first, middle, last = cut(arranged, [front, back])
    keys = [{weight.key for weight in stage.weights if weight.trainable} for stage in (first, middle, last)]
    return set(keys[0] | keys[2]), set(keys[1])


def test_penalties_on_weights_do_not_bring_them_to_others() -> None:
    owner, others = held_by(graph_of(Penalised()))
    assert {"first.weight", "head.weight", "head.bias"} <= owner
    assert "second.weight" in others
    assert not owner & others


class MergedHead(Model):
    """The head's weight is made of two, before the data comes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 16))

    def leave(self, hidden: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, self.head.weight + self.up @ self.down, self.head.bias)
        return nn.functional.cross_entropy(logits, labels)


def test_what_the_heads_weight_is_made_of_stays() -> None:
    owner, others = held_by(graph_of(MergedHead()))
    assert {"head.weight", "up", "down"} <= owner
    assert not owner & others


class Shared(Model):
    """The head uses a weight of the middle too."""

    def leave(self, hidden: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(nn.functional.linear(hidden, self.second.weight), labels)


class SharedThroughAProduct(Model):
    """The head's weight is made of one of the middle."""

    def leave(self, hidden: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        weight = self.head.weight @ self.second.weight
        return nn.functional.cross_entropy(nn.functional.linear(hidden, weight), labels)


@pytest.mark.parametrize("kind", [Shared, SharedThroughAProduct])
def test_a_weight_whose_gradient_would_show_the_labels_is_refused(kind: type[Model]) -> None:
    """Compnodes that train the same weight would get the owner's gradient of it."""
    with pytest.raises(
        GraphError, match=r"'second\.weight' .* trained by operators that read raw data or are the head"
    ):
        arrange_private(graph_of(kind()))
    arrange_private(graph_of(frozen(kind(), "first", "head")))


def test_the_values_that_show_raw_data() -> None:
    graph = llama_graph(layers=2)
    raw = raw_values(graph, train=True)
    assert {item.name for item in graph.inputs if item.private} <= raw
    assert graph.loss in raw
    arranged, front, back = arrange_private(graph)
    assert raw_values(arranged, train=True) == raw
    first, *others, last = cut(arranged, [front, (front + back) // 2, back])
    for stage in others:
        assert not raw & {each.value for each in stage.receives}
        assert not raw & {item.name for item in stage.inputs}
    assert raw & {item.name for item in (*first.inputs, *last.inputs)}
