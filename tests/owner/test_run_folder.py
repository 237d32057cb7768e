"""The run folder: one owner at a time, one run in it, and files that are replaced in one step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusionai.errors import ConfigError
from fusionai.owner.run_folder import RunFolder, open_run


def test_a_second_owner_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run"):
        with pytest.raises(ConfigError, match=r"another owner trains in the run folder .*run now"):
            RunFolder(tmp_path / "run")
        with pytest.raises(ConfigError, match="another owner trains"):
            open_run(None, tmp_path / "run", name="t")
    RunFolder(tmp_path / "run").close()


@pytest.mark.parametrize("kill", [True, False])
def test_a_folder_is_free_when_its_owner_has_ended(tmp_path: Path, kill: bool) -> None:
    script = (
        "import sys; from pathlib import Path; from fusionai.owner.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], **pipes) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().strip() == b"held"
        with pytest.raises(ConfigError, match="another owner trains"):
            RunFolder(tmp_path / "run")
        if kill:
            owner.kill()
        else:
            owner.communicate()
        owner.wait()
        assert owner.returncode == (0 if not kill else -signal.SIGKILL if os.name == "posix" else 1)
    RunFolder(tmp_path / "run").close()


@pytest.mark.parametrize("found", ["job.toml", "metrics.jsonl", "checkpoints/step-000003"])
def test_a_folder_that_holds_a_run_takes_no_other(tmp_path: Path, found: str) -> None:
    run = tmp_path / "run"
    (run / found).mkdir(parents=True)
    before = sorted(run.rglob("*"))
    remedy = f"go on with that run by --resume {run}, or give" if "step" in found else "and no checkpoint: give --run"
    with pytest.raises(ConfigError, match=f"holds a run already.*{remedy}"):
        open_run(run, None, name="t")
    with pytest.raises(ConfigError, match="holds a run already"):
        open_run(run, tmp_path / "old", name="t")
    assert sorted(run.rglob("*")) == before
    for same in (None, run, tmp_path / "x" / ".." / "run"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with open_run(same, run, name="t") as folder:
            assert folder.path == run


def test_what_an_attempt_left_that_was_refused_is_no_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", None, name="t") as folder:
        folder.text.parent.mkdir()
        folder.text.touch()
    open_run(tmp_path / "run", None, name="t").close()


def test_new_runs_of_one_moment_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionai.owner.run_folder.time.strftime", lambda form: "then")
    with RunFolder.fresh(tmp_path / "runs", "a b") as one, RunFolder.fresh(tmp_path / "runs", "a b") as other:
        assert (one.path.name, other.path.name) == ("a-b-then", "a-b-then-2")


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write("job.toml", "old")

        def cut_off(descriptor: int) -> None:
            assert (tmp_path / "job.toml").read_text() == "old"
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", cut_off)
        with pytest.raises(KeyboardInterrupt):
            folder.write("job.toml", "new")
        monkeypatch.undo()
        assert (tmp_path / "job.toml").read_text() == "old"
        folder.write("job.toml", "new")
        assert (tmp_path / "job.toml").read_text() == "new"
        assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", "checkpoints", "job.toml"]
