"""Buffers that training writes to live in one stage, with all that touches them, or the cut is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionai.errors import GraphError
from fusionai.graph.capture import capture
from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.model import OpDag, SubDag
from fusionai.graph.privacy import arrange_private
from fusionai.graph.verify import verify
from fusionai.graph.written_state import parting_positions, users_of_state

torch.set_num_threads(1)


class Tokens(nn.Module):
    """An embedding, four linear layers and a head; `step` may change what goes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 9)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("frequencies", torch.ones(9))
        self.register_buffer("before", torch.zeros(2, 5, dtype=torch.int64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for number, layer in enumerate(self.layers):
            hidden = torch.tanh(layer(self.step(number, hidden, input_ids, labels)))
        return functional.cross_entropy(self.score(self.head(hidden), labels).flatten(0, 1), labels.flatten())

    def step(self, number: int, hidden: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        return hidden

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits


def graph_of(*, any_size: bool = True, **methods: Callable[..., Tensor]) -> OpDag:
    torch.manual_seed(0)
    module = type("Tokens", (Tokens,), methods)()
    ids = torch.randint(0, 9, (2, 5))
    fixed: dict[str, dict[int, str]] = {"input_ids": {}, "labels": {}}
    return capture(module, {"input_ids": ids, "labels": ids.clone()}, dynamic=None if any_size else fixed).graph


def holders(stages: tuple[SubDag, ...], key: str) -> list[int]:
    return [stage.index for stage in stages if key in {weight.key for weight in stage.weights}]


def running_mean(self: Tokens, number: int, hidden: Tensor, *_: Tensor) -> Tensor:
    """Read early, written two layers later."""
    if number == 1:
        hidden = hidden - self.mean
    if number == 3:
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean((0, 1))
    return hidden


def test_no_cut_point_parts_the_users_of_a_buffer() -> None:
    graph, sizes = graph_of(step=running_mean), {"s0": 2, "s1": 5}
    ((weight, places),) = users_of_state(graph)
    assert weight.key == "mean"
    assert places[-1] - places[0] > 4
    parting = parting_positions(graph)
    points = cut_points(graph, sizes)
    assert points
    assert parting.isdisjoint(points)
    for point in points:
        assert len(holders(cut(graph, [point]), "mean")) == 1
    plain = graph_of()
    assert not parting_positions(plain)
    for position in parting:
        with pytest.raises(GraphError, match="parts the users of 'mean'"):
            cut(graph, [position])


def test_a_value_of_the_buffer_may_travel() -> None:
    def counting(self: Tokens, number: int, hidden: Tensor, *_: Tensor) -> Tensor:
        if number == 0:
            self.seen = self.seen + 1
        return hidden * self.seen

    graph = graph_of(step=counting)
    (places,) = [places for _, places in users_of_state(graph)]
    later = [point for point in cut_points(graph, {"s0": 2, "s1": 5}) if point > places[-1]]
    stages = cut(graph, [later[0]])
    assert holders(stages, "seen") == [0]
    assert {each.type.shape for each in stages[1].receives} == {(), ("s0", "s1", 8)}


def test_state_from_labels_stays_with_the_owner() -> None:
    def prior(self: Tokens, logits: Tensor, labels: Tensor) -> Tensor:
        shifted = logits - self.frequencies.log()
        self.frequencies = self.frequencies + functional.one_hot(labels, 9).float().sum((0, 1))
        return shifted

    arranged, front, back = arrange_private(graph_of(score=prior))
    verify(arranged)
    stages = cut(arranged, [front, back])
    assert holders(stages, "frequencies") == [2]


def test_state_that_shows_raw_inputs_is_read_by_the_owner_only() -> None:
    # The tokens of the last microbatch, which no compnode may see at the next one.
    def at(layer: int) -> Callable[..., Tensor]:
        def before(self: Tokens, number: int, hidden: Tensor, input_ids: Tensor, _: Tensor) -> Tensor:
            if number == layer:
                hidden = hidden + self.embedding(self.before)
                self.before = input_ids
            return hidden

        return before

    arranged, front, back = arrange_private(graph_of(step=at(0), any_size=False))
    stages = cut(arranged, [front, back])
    assert holders(stages, "before") == [0]
    assert not [each for each in stages[1].receives if each.type.dtype != "float32"]
    late, front, back = arrange_private(graph_of(step=at(2), any_size=False))
    stages = cut(late, [front, back])
    assert holders(stages, "before") == [0]
    assert not [each for each in stages[1].receives if each.type.dtype != "float32"]


def test_state_of_two_parts_of_a_private_job_is_refused() -> None:
    def scale(self: Tokens, number: int, hidden: Tensor, *_: Tensor) -> Tensor:
        return hidden * self.frequencies.sum() if number == 2 else hidden

    def prior(self: Tokens, logits: Tensor, labels: Tensor) -> Tensor:
        self.frequencies = self.frequencies + functional.one_hot(labels, 9).float().sum((0, 1))
        return logits

    with pytest.raises(GraphError, match=r"'frequencies'.*raw inputs|raw inputs in the middle"):
        arrange_private(graph_of(step=scale, score=prior))
