"""What a job file's run packs and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from fusionai.owner.language_model import prepare_language_model
from fusionai.owner.run_folder import RunFolder
from fusionai.training.config import job_from
from fusionai.training.data.packed import PackedText
from quick_capture import remembered_captures

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("kind", "task", "name"), [("bert", "masked", "BertForMaskedLM"), ("llama", "causal", "LlamaForCausalLM")]
)
def test_a_checkpoint_says_what_it_is_for_and_the_text_is_the_jobs(
    tmp_path: Path, kind: str, task: str, name: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words, again and again\n" * 100, encoding="utf-8")
    tables: dict[str, Any] = {
        "name": "t",
        "model": {"config": {"model_type": kind, **SIZES}, "task": task},
        "data": {"text": str(text), "vocabulary_size": 258, "sequence_length": 16},
        "training": {"batch_size": 1, "microbatches": 1},
    }
    with remembered_captures(), RunFolder(tmp_path / "run") as folder:
        folder.text.parent.mkdir()
        folder.text.write_bytes(b"what an attempt with another text left")
        prepared = prepare_language_model(job_from(tables, source="job.toml"), folder)
        assert PackedText(folder.text, 16).tokens > 2000
    prepared.files.extra(tmp_path / "checkpoint")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "checkpoint").architectures == [name]
