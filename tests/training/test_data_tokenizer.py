"""Tokenizers: trained on the spot or loaded, and every failure said in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusionai.errors import DataError
from fusionai.training.data import tokenizer as module
from fusionai.training.data.sources import text_documents
from fusionai.training.data.tokenizer import end_token, load_tokenizer, masking, token_ids, train_tokenizer

ODD = "def ü(x):\n\treturn '<|endoftext|>' + \"🙂\"  # \x00 \u200b\n\n"


def test_any_text_round_trips_at_the_least_vocabulary() -> None:
    tokenizer = train_tokenizer(["plain ascii only"], 258)
    assert len(tokenizer) == 258
    (ids,) = token_ids([ODD], tokenizer)
    assert ids[-1] == end_token(tokenizer)
    assert end_token(tokenizer) not in ids[:-1], "text must not be able to spell the end of a document"
    assert tokenizer.decode(ids[:-1]) == ODD


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    script = (
        "import sys, hashlib\n"
        "from fusionai.training.data.sources import text_documents\n"
        "from fusionai.training.data.tokenizer import train_tokenizer\n"
        "iterator = text_documents('stdlib')\n"
        "found = train_tokenizer([next(iterator) for _ in range(30)], 1000)\n"
        "print(hashlib.sha256(found.backend_tokenizer.to_str().encode()).hexdigest(), len(found))\n"
    )
    command = [sys.executable, "-c", script]
    first, second = (subprocess.run(command, capture_output=True, check=True, timeout=250).stdout for _ in range(2))
    assert first == second
    assert first.split()[1] == b"1000"


def test_training_on_a_large_corpus_reads_only_what_it_needs() -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield f"sentence number {taken} of an endless text.\n" * 2000

    tokenizer = train_tokenizer(endless(), 500)  # type: ignore[arg-type]
    assert len(tokenizer) <= 500
    assert taken < 100


def test_trained_tokenizer_is_kept_in_a_folder(tmp_path: Path) -> None:
    iterator = text_documents("stdlib")
    documents = [next(iterator) for _ in range(5)]
    trained = train_tokenizer(documents, 600)
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert list(token_ids(documents, loaded)) == list(token_ids(documents, trained))
    assert masking(loaded) == masking(trained)
    assert masking(loaded).mask_token == 1


def test_errors_of_training() -> None:
    with pytest.raises(DataError, match="at least 258"):
        train_tokenizer(["x"], 257)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ broken")
    with pytest.raises(DataError, match=r"cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    marker = tmp_path / "it-ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(DataError):
        load_tokenizer(str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["/not/a/folder", "a b", "x/y/z", ""])
def test_what_is_neither_folder_nor_name(name: str) -> None:
    with pytest.raises(DataError, match="neither an existing folder nor a name"):
        load_tokenizer(name)


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hub_resolves", lambda: False)
    with pytest.raises(DataError, match=r"cannot be reached.*data\.tokenizer"):
        load_tokenizer("some-one/no-such-tokenizer-at-all")


def test_a_tokenizer_that_lacks_what_is_needed() -> None:
    trained = train_tokenizer(["some text"], 300)
    trained.mask_token = None
    with pytest.raises(DataError, match="no mask token"):
        masking(trained)
    trained.eos_token = None
    with pytest.raises(DataError, match="neither an end-of-text"):
        end_token(trained)
    trained.sep_token = "<|endoftext|>"
    assert end_token(trained) == 0
