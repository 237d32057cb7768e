"""Which fields of a job may change when its run goes on: every field has a rule, and what is refused says why."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fusionai.errors import ConfigError
from fusionai.owner.job_file import job_of
from fusionai.owner.resumed_job import HONOURED, RULES, check_resumed, fields_of
from fusionai.training.config import JobConfig, job_from, to_toml

FOLDER, CHECKPOINT = Path("runs/x"), Path("runs/x/checkpoints/step-000004")

TABLES: dict[str, Any] = {
    "name": "t",
    "model": {"config": {"model_type": "llama", "num_hidden_layers": 3}},
    "data": {"text": "text.txt"},
    "training": {"batch_size": 2, "microbatches": 6},
}
OTHERS: dict[str, Any] = {
    "name": "other",
    "model.config": {"model_type": "llama", "num_hidden_layers": 9},
    "model.task": "masked",
    "data.text": "other.txt",
    "data.field": "words",
    "data.tokenizer": "gpt2",
    "training.loss_share": "equal",
    "training.precision": "bf16",
    "training.compile": True,
    "optimizer.kind": "sgd",
    "schedule.kind": "linear",
    "placement.privacy": "open",
    "placement.cuts": [3],
    "placement.replan": False,
    "placement.machines": ["a"],
}
"""Another value of each field that is no number."""


def job(**changes: Any) -> JobConfig:
    """Return the job with other values of some fields, such as `job(**{"training.seed": 7})`."""
    return changed(job_from(TABLES, source="job.toml"), **changes)


def changed(start: JobConfig, **changes: Any) -> JobConfig:
    table = msgspec.to_builtins(start)
    for name, value in changes.items():
        *parents, field = name.split(".")
        place = table
        for parent in parents:
            place = place[parent]
        place[field] = value
    return job_from(table, source="here")


def check(run: JobConfig, asked: JobConfig) -> None:
    check_resumed(run, asked, folder=FOLDER, checkpoint=CHECKPOINT)


def other(field: str, value: Any) -> Any:
    if field in OTHERS:
        return OTHERS[field]
    return value + 1 if isinstance(value, int) else (value + 1.0) / 4.0


def test_every_field_of_a_job_file_has_a_rule() -> None:
    """Whoever adds a field decides here what it means for a run that goes on."""
    assert RULES.keys() == {name for name, _ in fields_of(job())}


@pytest.mark.parametrize("field", sorted(set(RULES) - {"model.path"}))
def test_each_field_is_honoured_or_refused_with_a_reason(field: str) -> None:
    run = job()
    value = other(field, dict(fields_of(run))[field])
    asked = job(**{field: value})
    assert asked != run
    if RULES[field] == HONOURED or field == "optimizer.momentum":  # AdamW makes no use of it
        check(run, asked)
        return
    with pytest.raises(ConfigError) as caught:
        check(run, asked)
    text = str(caught.value)
    assert field in text
    assert RULES[field] in text
    assert f"model.path = '{CHECKPOINT}'" in text


def test_the_values_are_named() -> None:
    asked = job(**{"model.config": {"model_type": "llama", "num_hidden_layers": 9}, "data.text": "b.txt"})
    with pytest.raises(ConfigError) as caught:
        check(job(), asked)
    assert "model.config.num_hidden_layers is 3 in the run and 9 here" in str(caught.value)
    assert "data.text is 'text.txt' in the run and 'b.txt' here" in str(caught.value)


def test_a_model_instead_of_a_configuration() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is left out in the run and 'x' here.*model\.config is given"):
        check(job(), job(**{"model.path": "x", "model.config": None}))


@pytest.mark.parametrize(("batch_size", "microbatches", "same"), [(4, 3, True), (12, 1, True), (4, 4, False)])
def test_a_step_keeps_its_sequences(batch_size: int, microbatches: int, same: bool) -> None:
    asked = job(**{"training.batch_size": batch_size, "training.microbatches": microbatches})
    if same:
        check(job(), asked)
        return
    with pytest.raises(ConfigError) as caught:
        check(job(), asked)
    assert (
        str(caught.value).count("training.batch_size x training.microbatches is 2 x 6 in the run and 4 x 4 here") == 1
    )


@pytest.mark.parametrize(("before", "after", "same"), [(0.9, 0.5, True), (0.0, 0.9, False), (0.9, 0.0, False)])
def test_momentum_may_change_where_it_stays(before: float, after: float, same: bool) -> None:
    run, asked = (job(**{"optimizer.kind": "sgd", "optimizer.momentum": each}) for each in (before, after))
    if same:
        check(run, asked)
        return
    with pytest.raises(ConfigError, match=rf"optimizer\.momentum is {before} in the run and {after} here"):
        check(run, asked)


def test_one_file_may_be_named_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "other.txt"):
        Path(name).write_text("words", encoding="utf-8")
    Path("sub").mkdir()
    ways = ["./text.txt", str(tmp_path / "text.txt"), "sub/../text.txt"]
    if os.name == "posix":
        Path("link.txt").symlink_to("text.txt")
        ways.append("link.txt")
    for way in ways:
        check(job(), job(**{"data.text": way}))
    with pytest.raises(ConfigError, match=r"data\.text"):
        check(job(), job(**{"data.text": "other.txt"}))
    Path("text.txt").unlink()
    check(job(), job())  # the text is packed: its source is not needed any more
    with pytest.raises(ConfigError, match=r"data\.text"):
        check(job(), job(**{"data.text": "./text.txt"}))


def test_the_job_of_a_run_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(to_toml(job()), encoding="utf-8")
    found = job_of(None, tmp_path, ["training.steps=7"])
    assert found == job(**{"training.steps": 7})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "job.toml",
            'name = "t"\n[training]\nsteps = 3\n',
            r"made through the Python API.*fusionai\.train\(\.\.\., resume=",
        ),
        ("job.toml", "name = ", r"job\.toml, cannot be read"),
        ("fusionai.json", "{}", "is a checkpoint and no run: give the run folder that it lies in"),
        ("metrics.jsonl", "", r"no run that can be resumed: it has no job\.toml"),
    ],
)
def test_a_folder_that_is_no_run_of_a_job_file(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        job_of(None, tmp_path, [])
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none'} does not exist")):
        job_of(None, tmp_path / "none", [])
