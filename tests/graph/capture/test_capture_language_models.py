"""Captured language models compute what transformers computes, at sizes they were not traced at."""

from __future__ import annotations

import functools

import pytest
import torch
from eager_reference import assert_same_training_step
from tiny_language_models import VOCABULARY, language_model
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from fusionai.graph.capture import Captured, capture_transformers
from fusionai.graph.capture.transformers_models import IMPLEMENTATION
from fusionai.graph.encoding import content_hash, decode, encode
from fusionai.graph.verify import verify

torch.set_num_threads(1)

FAMILIES = ("gpt2", "llama", "qwen3", "gemma3", "mixtral", "qwen3_moe", "bert")


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return random tokens and labels, some labels not counted."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels[:, ::4] = -100
    positions = torch.arange(length).expand(rows, length).contiguous()
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}


@functools.cache
def captured_model(family: str) -> tuple[PreTrainedModel, Captured]:
    """Return a model and its capture, made once for all tests that leave both as they are."""
    model = language_model(family, 2)
    return model, capture_transformers(model, "masked" if family == "bert" else "causal")


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_equals_eager(family: str) -> None:
    model, captured = captured_model(family)
    graph = captured.graph
    verify(graph)
    assert decode(encode(graph)) == graph
    for rows, length in ((3, 9), (1, 20)):
        inputs = batch(rows, length)
        expected = model(**inputs).loss
        assert_same_training_step(captured, model, inputs, expected)


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral"])
def test_attention_is_one_operator(family: str) -> None:
    graph = captured_model(family)[1].graph
    attentions = [node for node in graph.nodes if node.op == "fusion.attention"]
    assert [node.args[3] for node in attentions] == [0, 1]
    assert {node.args[7] for node in attentions} == {family != "bert"}
    # Neither masks nor the search for packed sequences are left.
    assert not {"aten.cumsum.default", "aten.diff.default", "aten.where.self"} & {n.op for n in graph.nodes}


def test_gemma3_alternates_windows() -> None:
    graph = captured_model("gemma3")[1].graph
    windows = [node.args[5] for node in graph.nodes if node.op == "fusion.attention"]
    assert windows == [6, 0]


def test_inputs_say_what_is_private() -> None:
    graph = captured_model("llama")[1].graph
    assert [(item.name, item.role, item.private) for item in graph.inputs] == [
        ("input_ids", "tokens", True),
        ("labels", "labels", True),
        ("position_ids", "positions", False),
    ]
    assert all(item.type.shape == ("s0", "s1") for item in graph.inputs)


def test_tied_embedding_is_one_weight() -> None:
    graph = captured_model("gpt2")[1].graph
    (embedding,) = [weight for weight in graph.weights if weight.key == "transformer.wte.weight"]
    assert embedding.aliases == ("lm_head.weight",)
    users = [node.op for node in graph.nodes if any(getattr(a, "name", "") == embedding.name for a in node.args)]
    assert users == ["aten.embedding.default", "aten.linear.default"]


def test_softcap_and_dropout() -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=30.0,
        pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    captured = capture_transformers(model)
    softcaps = [node.args[6] for node in captured.graph.nodes if node.op == "fusion.attention"]
    assert softcaps == [30.0]
    inputs = batch(2, 12)
    assert_same_training_step(captured, model, inputs, model(**inputs).loss)

    dropping = language_model("gpt2", 1)
    for part in dropping.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    graph = capture_transformers(dropping).graph
    ops = {node.op: node.args for node in graph.nodes}
    assert ops["aten.dropout.default"][1] == 0.1
    assert ops["aten.scaled_dot_product_attention.default"][4] == 0.1
    assert "fusion.attention" not in ops


def test_model_and_transformers_are_left_as_they_were() -> None:
    model = language_model("mixtral", 1).eval()
    before = (model.config._attn_implementation, model.config._experts_implementation)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture_transformers(model)
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for registry in (AttentionInterface, AttentionMaskInterface, ExpertsInterface):
        assert IMPLEMENTATION not in registry._global_mapping


def test_meta_module_gives_the_same_graph() -> None:
    # Of a mixture of experts: transformers' own implementation takes another way on each device.
    with torch.device("meta"):
        model = language_model("mixtral", 2)
    assert content_hash(capture_transformers(model).graph) == content_hash(captured_model("mixtral")[1].graph)
