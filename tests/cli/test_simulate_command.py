"""`fusionai simulate`: what it says of jobs and pools, and what it refuses."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import msgspec
import pytest
from what_if_files import OWNER, job_file, machine, pool_file

from fusionai.cli.main import main
from fusionai.simulation.forecast.simulated_job import SimulatedJob
from fusionai.simulation.hardware.catalogue import lookup
from quick_pool import completed

MACHINE_FIELDS = {
    "peer",
    "busy_s",
    "idle_s",
    "absent_s",
    "utilisation",
    "bubble",
    "sent_bytes",
    "received_bytes",
    "energy_j",
    "rent_usd",
}


@pytest.fixture
def simulated(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command here, without the seconds of a process's imports; return its JSON and its words."""

    def run(*arguments: str | Path) -> tuple[dict[str, Any], str]:
        status = main(["simulate", *map(str, arguments), "--json"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        (line,) = shown.out.splitlines()
        return json.loads(line), " ".join(shown.err.split())

    return run


def files(folder: Path, *machines: dict[str, Any], **job: Any) -> tuple[Path, str, Path]:
    tables: dict[str, Any] = {
        "placement": {"privacy": "open", "compnodes": 3},
        "training": {"microbatches": 8, "steps": 1000},
        **job,
    }
    made = machines or (machine(name="home", count=4),)
    return job_file(folder, **tables), "--pool", pool_file(folder, *made, owner=None)


def test_a_process(tmp_path: Path) -> None:
    words = [*files(tmp_path), "--steps", "20", "--json", "--write", tmp_path / "found.json"]
    timeline, picture = tmp_path / "timeline.svg", tmp_path / "bandwidth.svg"
    drawn = util.find_spec("matplotlib") is not None
    if drawn:
        words += ["--timeline", timeline, "--bandwidth-picture", picture]
    ended = completed("simulate", *words)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == found
    assert found.keys() == {each.encode_name for each in msgspec.structs.fields(SimulatedJob)}
    report = found["report"]
    assert report["finished"]
    assert report["steps"] == 20
    assert report["tokens_per_s"] == pytest.approx(20 * 8 * 4 * 32 / report["elapsed_s"])
    assert report["p95_step_s"] >= report["median_step_s"]
    assert len(report["machines"]) == 3
    for each in report["machines"]:
        assert each.keys() == MACHINE_FIELDS
        assert each["busy_s"] + each["idle_s"] + each["absent_s"] == pytest.approx(report["elapsed_s"])
    assert sum(each["sent_bytes"] for each in report["links"]) == pytest.approx(report["sent_bytes"])
    # 20 of the job's 1000 steps were simulated.
    assert found["job"]["steps"] == 1000
    assert found["job"]["elapsed_s"] == pytest.approx(50 * report["elapsed_s"])
    assert found["job"]["energy_kwh"] == pytest.approx(50 * report["energy_j"] / 3.6e6)
    power_w = lookup("RTX 3080").power_w
    assert power_w is not None
    expected_j = sum(power_w * (each["busy_s"] + 0.3 * each["idle_s"]) for each in report["machines"])
    assert report["energy_j"] == pytest.approx(expected_j)
    assert report["electricity_usd"] == pytest.approx(0.15 * expected_j / 3.6e6)
    assert set(found["names"].values()) >= {"home-1", "home-4"}
    assert "At this pace the job's 1,000 steps take" in ended.stderr
    assert "Assumed, not measured" in ended.stderr
    if drawn:
        assert all("<svg" in path.read_text(encoding="utf-8") for path in (timeline, picture))
        assert "home-1" in timeline.read_text(encoding="utf-8")
        assert len(report["timeline"]) == 2 * 2 * 3 * 8
        speeds = [each["microbatches_per_s"] for each in found["sweep"]]
        assert speeds == sorted(speeds)
        assert 1.0 in [each["factor"] for each in found["sweep"]]


def test_it_executes_what_plan_predicts(tmp_path: Path, simulated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = files(tmp_path, machine(name="home", count=2), placement={"privacy": "open", "compnodes": 2})
    found, _ = simulated(*given, "--steps", "3")
    assert main(["plan", *map(str, given), "--json", "--no-what-if"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert found["plan"] == planned["plan"]
    assert found["predicted_step_s"] == planned["predicted_step_s"]
    # One pipeline of two machines: what shares a line comes one after another in the plan as well.
    assert found["report"]["median_step_s"] == pytest.approx(planned["predicted_step_s"], rel=0.02)


def test_options_reach_the_simulator(tmp_path: Path, simulated: Any) -> None:
    given = files(tmp_path, machine(20, name="home", count=4))
    words = "--steps 40 --seed 3 --churn 5min,1min --snapshot-steps 5 --recovery restart --codec topk:100"
    words += " --jitter 0.3,0.1"
    found, said = simulated(*given, *words.split(), "--sweep", "0.5-2", "--rent", "--usd-per-kwh", "0.3")
    report = found["report"]
    assert found["seed"] == 3
    assert report["snapshots"] > 0
    assert all(each["state_from"] for each in report["failures"])
    assert len(set(report["step_s"])) > 30, "jitter"
    assert {0.5, 1, 2} <= {each["factor"] for each in found["sweep"]}
    assert report["electricity_usd"] == pytest.approx(0.3 * report["energy_j"] / 3.6e6)
    assert len(found["unrented"]) == 3
    assert "Nobody publishes a rent for: home-" in said
    assert "bandwidth" in said


@pytest.mark.parametrize(
    ("text", "low", "high"), [("1e-3-10", 1e-3, 10), ("1E-3-1e-2", 1e-3, 1e-2), ("0.5-2", 0.5, 2), ("1-1e+2", 1, 100)]
)
def test_ranges_of_a_sweep(text: str, low: float, high: float, tmp_path: Path, simulated: Any) -> None:
    found, _ = simulated(*files(tmp_path), "--steps", "1", "--sweep", text)
    factors = [each["factor"] for each in found["sweep"]]
    assert (factors[0], factors[-1]) == (low, high)


LINES = "Of tensors that find a line free, the plan sends another one first"


def test_why_a_step_is_not_as_predicted(tmp_path: Path, simulated: Any) -> None:
    pair = files(tmp_path, machine(name="home", count=2), placement={"privacy": "open", "compnodes": 2})
    found, said = simulated(*pair, "--steps", "3")
    assert found["undisturbed_step_s"] == pytest.approx(found["report"]["median_step_s"])
    assert found["disturbed_by"] == []
    assert (abs(found["undisturbed_step_s"] / found["predicted_step_s"] - 1) > 0.005) == (LINES in said)
    assert "What makes the difference" not in said
    churned, said = simulated(*pair, "--steps", "9", "--seed", "1", "--detection", "1ms", "--churn", "50ms,20ms")
    assert churned["report"]["median_step_s"] > 1.1 * found["undisturbed_step_s"]
    assert churned["undisturbed_step_s"] == found["undisturbed_step_s"]
    assert "What makes the difference: machines that leave" in said


def test_equal_steps_need_no_explanation(tmp_path: Path, simulated: Any) -> None:
    alone = files(tmp_path, machine(name="home"), placement={"privacy": "open", "compnodes": 1})
    found, said = simulated(*alone, "--steps", "3")
    assert found["undisturbed_step_s"] == pytest.approx(found["predicted_step_s"], rel=0.005)
    assert LINES not in said


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--steps", "0"], ["--steps must be at least 1, got 0"]),
        (["--churn", "6"], ["--churn '6' is no duration; write such as 90s, 20min, 1.5h or 2d"]),
        (["--churn", "6h,"], ["--churn '' is no duration"]),
        (["--recovery", "pray"], ["--recovery", "replay"]),
        (["--snapshot-steps", "0"], ["--snapshot-steps must be at least 1"]),
        (["--codec", "zip"], ["--codec 'zip' is unknown", "topk:RATIO"]),
        (["--codec", "topk:0.5"], ["--codec 'topk:0.5'", "at least 1"]),
        (["--jitter", "much"], ["--jitter 'much' is no share"]),
        (["--sweep", "1e-3-1e-4"], ["--sweep '1e-3-1e-4' is no range", "LOW < HIGH"]),
        (["--sweep", "1e-3"], ["--sweep '1e-3' is no range"]),
        (["--churn", "0s"], ["--churn must be above 0, got '0s'"]),
        (["--detection", "0s"], ["--detection must be above 0, got '0s'"]),
        (["--sweep", "10-1"], ["--sweep '10-1' is no range", "LOW < HIGH"]),
        (["--usd-per-kwh", "-1"], ["--usd-per-kwh must be at least 0"]),
        (["--timeline", "none/there/x.svg"], ["--timeline", "is no folder; name a file in a folder"]),
        (["--pipelines"], ["--pipelines: the job says how many machines serve", "placement.compnodes=0"]),
    ],
)
def test_what_is_refused(
    words: list[str], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["simulate", *map(str, files(tmp_path)), *words, "--json"])
    shown = capsys.readouterr()
    assert status == 2
    (line,) = shown.err.splitlines()
    assert all(text in line for text in texts), line
    assert json.loads(shown.out)["error"] == "ConfigError"


def test_pictures_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusionai.cli.simulation_pictures.find_spec", lambda name: None)
    assert main(["simulate", *map(str, files(tmp_path)), "--timeline", str(tmp_path / "x.svg")]) == 2
    assert "pip install 'fusionai[plots]'" in capsys.readouterr().err


def test_a_job_that_cannot_be_placed_says_what_a_pool_file_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_file(tmp_path)
    tiny = pool_file(tmp_path, machine(name="attic", memory="1MB"), owner=OWNER)
    for words in (["plan"], ["simulate"], ["simulate", "--pipelines"]):
        command, *options = words
        assert main([command, str(job), "--pool", str(tiny), *options]) == 3
        text = capsys.readouterr().err
        assert "offers 1 MB: " in text
        assert "are missing" in text
        assert "in the pool file" in text
        assert "join" not in text
