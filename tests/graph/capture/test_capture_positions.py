"""What a model of transformers does about positions is captured; 0..T-1 are an input only where that is the same."""

from __future__ import annotations

import functools
from typing import Any, Literal

import pytest
import torch
import transformers
from eager_reference import assert_same_training_step
from tiny_language_models import language_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fusionai.errors import GraphError
from fusionai.graph.capture import Captured, capture, capture_transformers
from fusionai.graph.cuts import cut
from fusionai.graph.encoding import content_hash
from fusionai.graph.privacy import arrange_private

torch.set_num_threads(1)

PADDING = 1
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "pad_token_id": PADDING,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
PLAIN = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ESM = {**PLAIN, "mask_token_id": 3, "token_dropout": False}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
DISTILBERT = {"vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 40}
DISTILBERT |= {"dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": PADDING}

Task = Literal["causal", "masked"]

OWN: dict[str, tuple[str, Task, dict[str, Any]]] = {
    "roberta": ("Roberta", "masked", PLAIN),
    "roberta-causal": ("Roberta", "causal", {**PLAIN, "is_decoder": True}),
    "xlm-roberta": ("XLMRoberta", "masked", PLAIN),
    "camembert": ("Camembert", "masked", PLAIN),
    "data2vec-text": ("Data2VecText", "masked", PLAIN),
    "esm": ("Esm", "masked", {**ESM, "position_embedding_type": "absolute"}),
}
"""Models whose positions start behind the padding token's number."""

COUNTED: dict[str, tuple[str, Task, dict[str, Any]]] = {
    "bert": ("Bert", "masked", PLAIN),
    "electra": ("Electra", "masked", {**PLAIN, "embedding_size": 32}),
    "distilbert": ("DistilBert", "masked", DISTILBERT),
    "opt": ("OPT", "causal", OPT),
    "gpt-neox": ("GPTNeoX", "causal", SIZES),
}
"""Models that count from 0."""


def model_of(name: str) -> PreTrainedModel:
    family, task, settings = {**OWN, **COUNTED}[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**settings)
    model: PreTrainedModel = getattr(transformers, f"{family}For{'CausalLM' if task == 'causal' else 'MaskedLM'}")(
        config
    )
    return model.train()


@functools.cache
def captured_model(name: str) -> tuple[PreTrainedModel, Captured]:
    model = model_of(name)
    return model, capture_transformers(model, {**OWN, **COUNTED}[name][1])


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    """Return random tokens, some of them padding, and labels."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 97, (rows, length), generator=generator)
    ids[0, length - 3 :] = PADDING
    ids[-1, 2] = PADDING
    return {"input_ids": ids, "labels": torch.randint(4, 97, (rows, length), generator=generator)}


@pytest.mark.parametrize("name", [*OWN, *COUNTED])
def test_equals_transformers_without_positions(name: str) -> None:
    model, captured = captured_model(name)
    assert [item.name for item in captured.graph.inputs if item.role == "positions"] == (
        ["position_ids"] if name in COUNTED else []
    )
    assert {item.name for item in captured.graph.inputs} <= {"input_ids", "labels", "position_ids"}
    for rows, length in ((2, 10), (3, 17)):
        given = tokens(rows, length)
        expected = model(**given).loss
        fed = {**given, "position_ids": torch.arange(length).repeat(rows, 1)} if name in COUNTED else given
        assert_same_training_step(captured, model, fed, expected)


@pytest.mark.parametrize("name", ["roberta", "esm"])
def test_positions_from_tokens_stay_with_the_owner(name: str) -> None:
    graph = captured_model(name)[1].graph
    arranged, front, back = arrange_private(graph)
    counting = [place for place, node in enumerate(arranged.nodes) if node.op == "aten.cumsum.default"]
    assert counting
    assert max(counting) < front < back
    for subdag in cut(arranged, [front, back])[1:2]:
        assert not subdag.inputs
        assert all(transfer.type.dtype == "float32" for transfer in subdag.receives)
    # An open job may cut anywhere: the first stage makes the positions.
    first, second = cut(graph, [len(graph.nodes) // 2])
    assert [item.name for item in first.inputs] == ["input_ids"]
    assert [item.name for item in second.inputs] == ["labels"]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_meta_module_gives_the_same_graph(name: str) -> None:
    with torch.device("meta"):
        empty = model_of(name)
    captured = capture_transformers(empty, "masked")
    assert content_hash(captured.graph) == content_hash(captured_model(name)[1].graph)


def skip_padding(part: nn.Module) -> None:
    """Have a part of a model number its tokens without padding when it is given no positions."""
    inner = part.forward

    def skipping(input_ids: Tensor, position_ids: Tensor | None = None, **others: Any) -> Any:
        if position_ids is None:
            position_ids = (input_ids != PADDING).long().cumsum(1) - 1
        return inner(input_ids=input_ids, position_ids=position_ids.clamp_min(0), **others)

    part.forward = skipping  # type: ignore[method-assign]


def test_a_model_that_skips_padding_has_positions_of_its_own() -> None:
    model = model_of("bert")
    skip_padding(model.bert.embeddings)
    captured = capture_transformers(model, "masked")
    assert [item.name for item in captured.graph.inputs] == ["input_ids", "labels"]
    given = tokens(2, 10)
    assert_same_training_step(captured, model, given, model(**given).loss)


def test_a_model_that_divides_its_sequences_at_padding_is_refused() -> None:
    # transformers takes positions that do not rise by one for the start of another document.
    model = language_model("gpt2", 1)
    model.config.pad_token_id = PADDING
    skip_padding(model.transformer)
    with pytest.raises(GraphError, match="divides its sequences wherever its positions do not rise by one"):
        capture_transformers(model, validate_values=False)


class Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(97, 8), nn.Embedding(40, 8)
        self.head = nn.Linear(8, 97)

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.tokens(input_ids) + self.places(position_ids)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def packed(rows: int, length: int) -> dict[str, Tensor]:
    return {**tokens(rows, length), "position_ids": (torch.arange(length) % 6).repeat(rows, 1)}


def test_positions_that_a_user_gives_are_data() -> None:
    net = Positional()
    captured = capture(net, packed(2, 10))
    (item,) = [each for each in captured.graph.inputs if each.name == "position_ids"]
    assert (item.role, item.private, item.type.shape) == ("data", True, ("s0", "s1"))
    given = packed(3, 8)
    assert_same_training_step(captured, net, given, net(**given))
    with pytest.raises(GraphError, match="'position_ids' has the role 'positions'"):
        capture(net, packed(2, 10), roles={"position_ids": "positions"})
    counted = {**tokens(2, 10), "position_ids": torch.arange(10).repeat(2, 1)}
    (asked,) = [
        each
        for each in capture(net, counted, roles={"position_ids": "positions"}).graph.inputs
        if each.name == "position_ids"
    ]
    assert (asked.role, asked.private) == ("positions", False)


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "position_ids"), ("llama", "attention_mask"), ("bert", "token_type_ids"), ("bert", "attention_mask")],
)
def test_optional_inputs_of_transformers_are_honoured(family: str, name: str) -> None:
    def given(rows: int, length: int) -> dict[str, Tensor]:
        number = torch.arange(length)
        optional = {
            "position_ids": number % 6,
            "attention_mask": (number < length - 3).long(),
            "token_type_ids": (number > 4).long(),
        }
        return {**tokens(rows, length), name: optional[name].repeat(rows, 1)}

    model = language_model(family, 1).train()
    captured = capture(model, given(2, 16))
    assert [item.name for item in captured.graph.inputs] == ["input_ids", "labels", name]
    with torch.no_grad():
        assert model(**given(3, 11)).loss != model(**tokens(3, 11)).loss
    assert_same_training_step(captured, model, given(3, 11), model(**given(3, 11)).loss)
