"""`fusionai paper`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fusionai.cli.main import main
from quick_pool import completed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper.md"


def test_one_model(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = ["paper", "--models", "bert-large", "--rates", "100", "--json", "--write", str(page)]
    ended = completed(*words)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["peaks"] == {"consumer": pytest.approx(2975), "pcie": pytest.approx(3024), "sxm": pytest.approx(3956)}
    assert len(found["reconstruction"]) == 12
    rows = found["rows"]
    # Two references, and the rate with two codecs: once for inference, for two sizes of a step in training.
    assert len(rows) == 3 * (2 + 2)
    for row in rows:
        assert row.keys() >= {"model", "task", "pool", "link_mbps", "codec", "latency_s", "plan"}
        assert row["throughput"] == row["tokens_per_s"]
        assert row["ratio_to_4xH100"] == row["ratio_to_4xh100_pcie"] > 0
        assert f"{row['pipelines']} x {row['stages']} stages" in row["plan"]
        assert "3080" not in row["pool"] or (row["link"], row["link_mbps"]) == ("100 Mbps", 100)
        assert row["tokens_per_s"] == pytest.approx(512 * row["samples_per_s"])
        assert row["machines"] == row["pipelines"] * row["stages"] <= 50
        assert row["fits"] == (not row["missing"])
        assert row["latency_s"] > 0
        assert row["kwh_per_million_tokens"] > 0
        assert (row["rent_usd_per_million_tokens"] is None) == ("3080" in row["pool"])
        assert row["purchase_usd"] == (pytest.approx(34_950) if "3080" in row["pool"] else None)
    assert {row["ratio_to_4xh100_pcie"] for row in rows if row["pool"] == "4 H100 PCIe"} == {1.0}
    at_home = [row for row in rows if row["link"] == "100 Mbps" and row["task"] == "inference"]
    assert all(row["stages"] == 1 and row["ratio_to_4xh100_pcie"] > 0.8 for row in at_home)
    steps = [row for row in rows if row["link"] == "100 Mbps" and row["task"] == "training" and row["codec"] == "dense"]
    assert all(row["ratio_to_4xh100_pcie"] < 0.1 for row in steps)
    small, large = sorted(steps, key=lambda row: row["samples"])
    assert small["machines"] < large["machines"] == 50, "fewer cards have less to sum"
    assert large["limit"] == "summing gradients"
    # Prose is wrapped.
    text = " ".join(page.read_text(encoding="utf-8").split())
    made_by = shlex.join(["fusionai", *(word for word in words if word != "--json")])
    assert f"Made by `{made_by}` on" in text
    assert "predicted, none is measured" in text
    assert "A reconstruction, not the paper's words" in text
    assert "**bert-large, training, 512 sequences a step, dense**: does not at 100 Mbps" in text


def test_the_page_of_the_documentation_is_of_this_code() -> None:
    """Not its figures, which a new one would change; what is in it."""
    text = PAGE.read_text(encoding="utf-8")
    assert "Made by `fusionai paper --write docs/paper.md` on" in text
    for needed in ("bert-large", "gpt2-xl", "llama-8b", "gpt3-175b", "2,975", "3,024", "compute-only", "10 Mbps"):
        assert needed in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rates", "0"], "--rates must be between"),
        (["--rates", "nan"], "--rates must be between"),
        (["--models", "gpt5"], "invalid choice"),
    ],
)
def test_what_is_refused(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "--write", str(tmp_path / "none" / "page.md")]) == 2
    assert "is no folder" in capsys.readouterr().err
