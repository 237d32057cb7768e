"""A job file becomes the same OP-DAG for planning, without weights and text, as for training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusionai.errors import ConfigError
from fusionai.graph.encoding import content_hash
from fusionai.owner.language_model import prepare_language_model
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.what_if import request_of
from fusionai.training.config import JobConfig, job_from

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def job(text: Path, **config: Any) -> JobConfig:
    text.write_text("some words, again and again\n" * 200, encoding="utf-8")
    table = {
        "name": "t",
        "model": {"config": {**LLAMA, **config}},
        # Just the bytes and the two special tokens: what any text gives.
        "data": {"text": str(text), "vocabulary_size": 258, "sequence_length": 16},
        "training": {"batch_size": 3, "microbatches": 5},
        "placement": {"privacy": "open"},
    }
    return job_from(table, source="job.toml")


@pytest.mark.parametrize("config", [{}, {"vocab_size": 1000}, {"tie_word_embeddings": True}])
def test_the_graph_is_the_one_that_is_trained(config: dict[str, Any], tmp_path: Path) -> None:
    asked = job(tmp_path / "text.txt", **config)
    request, prepared = request_of(asked), prepare_language_model(asked, RunFolder(tmp_path / "run"))
    assert request.problem.graph_hash == content_hash(prepared.graph)
    assert request.tokens_per_step == prepared.tokens_per_step == 3 * 5 * 16
    assert sorted(request.problem.sizes.values()) == [3, 16]
    assert (request.problem.front, request.problem.back) == (0, len(prepared.graph.nodes))


def test_a_pretrained_folder_needs_no_more_than_its_configuration(tmp_path: Path) -> None:
    import transformers

    transformers.LlamaConfig(**LLAMA, vocab_size=500).save_pretrained(tmp_path)
    table = {"name": "t", "model": {"path": str(tmp_path)}, "data": {"sequence_length": 16}}
    request = request_of(job_from(table, source="job.toml"))
    assert 0 < request.problem.front < request.problem.back < len(request.problem.graph.nodes)
    assert {tuple(weight.type.shape) for weight in request.problem.graph.weights if "embed" in weight.key} == {
        (500, 32)
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    table["model"] = {"path": str(empty)}
    with pytest.raises(ConfigError, match="holds no transformers configuration"):
        request_of(job_from(table, source="job.toml"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_key_value_heads": 0}, "makes no model: ZeroDivisionError"),
        ({"hidden_act": "foo"}, "makes no model: transformers knows no hidden_act = 'foo'"),
        ({"vocab_size": 0}, "makes no model: "),
    ],
)
def test_a_folder_with_a_configuration_that_makes_no_model(wrong: dict[str, Any], says: str, tmp_path: Path) -> None:
    """No table of the job file has these fields: the folder is named, by whoever stumbles."""
    fields = {"vocab_size": 500, "architectures": ["LlamaForCausalLM"], **LLAMA, **wrong}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    table = {"name": "t", "model": {"path": str(tmp_path)}, "data": {"sequence_length": 16}}
    with pytest.raises(ConfigError) as refused:
        request_of(job_from(table, source="job.toml"))
    assert f"the configuration of {tmp_path} {says}" in str(refused.value)


def test_weights_are_refused_where_a_configuration_makes_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[model.config\] makes no model: AssertionError"):
        prepare_language_model(job(tmp_path / "text.txt", pad_token_id=999), RunFolder(tmp_path / "run"))


def test_a_configuration_without_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    table = {"name": "t", "model": {"path": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"ViTConfig has no vocab_size.*model\.path"):
        request_of(job_from(table, source="job.toml"))


def test_a_masked_model() -> None:
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    table = {"name": "t", "model": {"config": config, "task": "masked"}}
    request = request_of(job_from(table, source="job.toml"))
    assert request.shared_cost.trainable_bytes < request.whole_cost.trainable_bytes
