"""`fusionai plan`: what it says of jobs and pools, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from what_if_files import LLAMA, OWNER, job_file, machine, pool_file

from fusionai.cli.main import main
from fusionai.owner.pool_file import read_pool
from fusionai.owner.what_if import request_of
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import PlanLimits
from fusionai.simulation.forecast.request import with_owner
from fusionai.training.config import read_job
from quick_pool import completed

LLAMA_70B = {
    **LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command here, without the seconds of a process's imports; return its JSON and its words."""

    def run(*arguments: str | Path) -> tuple[dict[str, Any], str]:
        status = main(["plan", *map(str, arguments), "--json"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        (line,) = shown.out.splitlines()
        return json.loads(line), " ".join(shown.err.split())

    return run


def test_three_machines(tmp_path: Path) -> None:
    job = job_file(tmp_path, placement={"privacy": "open", "compnodes": 3}, training={"microbatches": 8})
    pool = pool_file(tmp_path, machine(name="home", count=2), machine(name="lab", gpu="RTX 4090"), owner=None)
    ended = completed("plan", job, "--pool", pool, "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)

    request, what_if = request_of(read_job(job)), with_owner(read_pool(pool), "open")
    assert what_if.owner is not None
    limits = PlanLimits(compnodes=3, most_pipelines=1)
    direct = plan(request.problem.within(limits).on_pool(what_if.pool(), what_if.owner))
    assert [each["start"] for each in found["plan"]["pipelines"][0]["stages"]] == [each.start for each in direct.stages]
    assert found["predicted_step_s"] == pytest.approx(direct.predicted_step_s, rel=1e-9)
    assert found["tokens_per_s"] == pytest.approx(4 * 32 * 8 / found["predicted_step_s"])
    assert found["bound_share"] == pytest.approx(found["bound_step_s"] / found["predicted_step_s"])
    assert 0 < found["bound_share"] <= 1
    assert found["bottleneck"] == found["plan"]["bottleneck"]
    assert found["planning_s"] > 0
    assert found["lab"] is False
    assert {each["machine"] for each in found["stages"]} == {"home-1", "home-2", "lab"}
    assert {each["machine"]: each["alike"] for each in found["alone"]} == {"home-1": 2, "lab": 1}
    assert found["what_if"].keys() == {"one_more_machine", "bottleneck_link_doubled", "uplinks_doubled"}
    assert all(each["speedup"] >= 1 for each in found["what_if"].values())
    assert "RTX 4090" in found["what_if"]["one_more_machine"]["what"]
    (assumed,) = (each for each in found["assumed"] if "peak" in each["figure"])
    assert assumed["machines"] == ["home-1", "home-2", "lab"]
    assert "60 % of peak" in assumed["note"]
    assert "Assumed, not measured: share of a device's published peak" in ended.stderr
    assert "Assumed, not measured: the owner's machine: the pool file has none" in ended.stderr


def test_a_private_job(tmp_path: Path, planned: Any) -> None:
    job, pool = job_file(tmp_path), pool_file(tmp_path, machine(name="home", count=2))
    found, words = planned(job, "--pool", pool)
    stages = found["stages"]
    assert stages[0]["machine"] == stages[-1]["machine"] == "owner"
    assert {each["machine"] for each in stages[1:-1]} <= {"home-1", "home-2"}
    assert [each["machine"] for each in found["alone"]] == ["owner", "home-1"], "the fastest first"
    assert [each["with_owner"] for each in found["alone"]] == [False, True]
    assert "Train on owner alone: " in words
    assert "faster than this pool" in words
    assert found["alone"][0]["speedup"] == pytest.approx(
        found["predicted_step_s"] / found["alone"][0]["predicted_step_s"]
    )


def test_one_machine_is_faster_when_links_are_slow(tmp_path: Path, planned: Any) -> None:
    job = job_file(tmp_path, placement={"privacy": "open", "compnodes": 3})
    slow = pool_file(tmp_path, machine(1, name="home", count=3), owner=None)
    found, words = planned(job, "--pool", slow)
    assert found["alone"][0]["speedup"] > 10
    assert "Train on home-1 alone (or another of the 3 like it): " in words
    assert 1 < found["what_if"]["uplinks_doubled"]["speedup"] < 1.5, (
        "two tensors share an uplink; downlinks are as slow"
    )
    free, words = planned(job, "--pool", slow, "--set", "placement.compnodes=0")
    assert len(free["stages"]) == 1
    assert free["alone"][0]["speedup"] == pytest.approx(1)
    assert "bottleneck_link_doubled" not in free["what_if"]
    assert "This plan uses one machine: train on home-1" in words
    assert "Left out: home-2, home-3 (with more compnodes" in words


def test_a_pool_is_needed_when_the_model_fits_no_machine(tmp_path: Path, planned: Any) -> None:
    wide = {**LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
    job = job_file(tmp_path, wide, placement={"privacy": "open"}, training={"microbatches": 16})
    pool = pool_file(tmp_path, machine(10_000, name="home", count=4, memory="1GB"), owner=None)
    found, words = planned(job, "--pool", pool)
    assert len(found["stages"]) > 1
    assert all(each["speedup"] is None for each in found["alone"])
    assert "needs at least" in found["alone"][0]["why_not"]
    assert "are missing" in found["alone"][0]["why_not"]
    assert "No machine could train this job alone" in words


def seventy_billion(folder: Path) -> tuple[Path, Path]:
    training = {"batch_size": 1, "microbatches": 64, "precision": "bf16"}
    job = job_file(folder, LLAMA_70B, data={"sequence_length": 2048}, training=training)
    owner = {**OWNER, "gpu": "RTX 4090"}
    return job, pool_file(folder, machine(name="a", gpu="A100 SXM 80GB", count=50), owner=owner)


def test_seventy_billion_parameters_on_fifty_machines(tmp_path: Path, planned: Any) -> None:
    job, pool = seventy_billion(tmp_path)
    started_s = time.process_time()
    found, _ = planned(job, "--pool", pool, "--no-what-if")
    assert time.process_time() - started_s < 60, "seconds of computing, about 10 on an idle machine"
    assert found["alone"] == []
    assert found["what_if"] == {}
    assert len(found["stages"]) > 20
    assert all(each["memory_bytes"] < each["offered_bytes"] for each in found["stages"])
    # 6 FLOPs for each of 69e9 parameters and 64 x 2048 tokens, at 60 % of 312 TFLOP/s, attention on top.
    assert found["bound_step_s"] == pytest.approx(6 * 69e9 * 64 * 2048 / (50 * 0.6 * 312e12), rel=0.5)


@pytest.mark.slow
def test_seventy_billion_parameters_with_every_what_if(tmp_path: Path) -> None:
    job, pool = seventy_billion(tmp_path)
    ended = completed("plan", job, "--pool", pool, "--json")
    assert ended.returncode == 0, ended.stderr
    assert all(each["speedup"] is None for each in json.loads(ended.stdout)["alone"])


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Return the exit status and the text of an error, which is one line."""
    status = main(["plan", *map(str, arguments), "--json"])
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    assert json.loads(shown.out)["message"] == line.removeprefix("error: ")
    return status, line


@pytest.mark.parametrize(
    ("machines", "owner", "texts"),
    [
        ([machine(gpu="RTX 3O80")], OWNER, ["pool.toml: machines[0].gpu", "nearest", "RTX 3080"]),
        ([machine(up_mbps="fast")], OWNER, ["machines[0].up_mbps must be a number, got 'fast'"]),
        ([machine(uplink=3)], OWNER, ["machines[0].uplink = 3 is no field"]),
        ([machine()], None, ["no [owner] table", 'placement.privacy = "open"']),
    ],
)
def test_bad_pools(
    machines: list[dict[str, Any]],
    owner: dict[str, Any] | None,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, line = refused(capsys, job_file(tmp_path), "--pool", pool_file(tmp_path, *machines, owner=owner))
    assert status == 2
    assert all(text in line for text in texts), line


@pytest.mark.parametrize(
    ("override", "status", "text"),
    [
        ("training.stepz=5", 2, "unknown field `stepz`"),
        ("model.config.hidden_sizes=5", 2, "hidden_sizes is no field of 'llama'"),
        ("model.config.model_type=lama", 2, "model.config is no configuration of 'lama'"),
        ("data.sequence_length=8192", 2, "the model takes at most 4096 positions"),
        ("placement.compnodes=9", 3, "asks for 9 compnodes, but only 2"),
        ("model.config.num_attention_heads=0", 2, "model.config.num_attention_heads must be at least 1, got 0"),
        ("model.config.num_key_value_heads=0", 2, "model.config.num_key_value_heads must be at least 1, got 0"),
        ("model.config.vocab_size=-1", 2, "model.config.vocab_size must be at least 1, got -1"),
        ("model.config.intermediate_size=0", 2, "model.config.intermediate_size must be at least 1, got 0"),
        ("model.config.num_hidden_layers=-1", 2, "model.config.num_hidden_layers must be at least 1, got -1"),
        ("model.config.num_key_value_heads=3", 2, "num_key_value_heads must divide num_attention_heads, which is 4"),
        ("model.config.hidden_act=sillu", 2, "model.config.hidden_act is 'sillu', no activation of transformers; try"),
        ("model.config.to_dict=1", 2, "model.config.to_dict is no field of 'llama'"),
        # What has no check of its own.
        ("model.config.pad_token_id=999999", 2, "[model.config] makes no model: AssertionError: Padding_idx must be"),
        ("model.config.hidden_size=1000000000000000", 2, "[model.config] makes no model: RuntimeError: Storage size"),
    ],
)
def test_bad_jobs(override: str, status: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = pool_file(tmp_path, machine(count=2))
    found, line = refused(capsys, job_file(tmp_path), "--pool", pool, "--set", override)
    assert found == status, line
    assert text in line


def test_too_little_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {**LLAMA, "hidden_size": 1024, "intermediate_size": 2816}
    job = job_file(tmp_path, wide)
    small = [machine(name="home", count=2, memory="100MB"), machine(name="attic", memory="150MB")]
    status, line = refused(capsys, job, "--pool", pool_file(tmp_path, *small))
    assert status == 3
    assert "are missing" in line or "more" in line
    tiny = machine(name="attic", memory="1MB")
    status, line = refused(capsys, job, "--pool", pool_file(tmp_path, tiny))
    assert status == 3
    assert "the best compnode, attic, offers 1 MB" in line
    weak = {**OWNER, "memory": "1MB"}
    status, line = refused(capsys, job, "--pool", pool_file(tmp_path, machine(), owner=weak))
    assert status == 3
    assert "its machine, owner, offers 1 MB" in line
    hidden = {**OWNER, "dialable": False}
    pool = pool_file(tmp_path, machine(name="cellar", dialable=False), owner=hidden)
    status, line = refused(capsys, job, "--pool", pool)
    assert status == 3
    assert "cellar" in line


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, pool = job_file(tmp_path), pool_file(tmp_path, machine())
    assert refused(capsys, job)[0] == 2
    status, line = refused(capsys, tmp_path / "none.toml", "--pool", pool)
    assert status == 2
    assert "the job file" in line
    ended = completed("plan", job, "--pool", tmp_path / "none.toml", "--json")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the pool file")
    assert "none.toml does not exist" in line
    assert json.loads(ended.stdout)["error"] == "ConfigError"
