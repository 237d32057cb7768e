"""The entry of the command line: help, errors, logs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from fusionai.cli import status
from fusionai.cli.lab_file import read_lab
from fusionai.cli.logging_setup import set_up_logging
from fusionai.cli.main import COMMANDS, main
from fusionai.errors import ConfigError, PlacementError


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom fusionai.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich', 'cryptography'} & sys.modules.keys()\n"
        "assert len(sys.modules) < 250, len(sys.modules)"  # 155, which load in 0.1 s on an idle machine
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=250)
    assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("error", "expected", "name"),
    [
        (PlacementError("too little memory"), 3, "PlacementError"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (KeyError("x"), 1, "KeyError"),
    ],
)
def test_errors(
    error: BaseException,
    expected: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr(status, "run", fail)
    assert main(["status", "--broker", "x", "--json"]) == expected
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"] == name
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    if name == "KeyError":
        assert "--debug" in shown.err
        main(["status", "--broker", "x", "--debug"])
        assert "Traceback" in capsys.readouterr().err


def test_log_file_is_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "all.jsonl"
    set_up_logging(log_file=path)
    logging.getLogger("fusionai.test").info("it's %s", "here")
    set_up_logging()
    entry = json.loads(path.read_text(encoding="utf-8"))
    assert (entry["level"], entry["logger"], entry["message"]) == ("info", "fusionai.test", "it's here")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[links]\n'a->b' = 'telegraph'", "telegraph"),
        ("[links]\n'a' = 'lan'", "a->b"),
        ("[links]\n'a->b' = { loss_pct = 200 }", "loss_pct"),
        ("[links]\n'a->b' = { speed = 2 }", "speed"),
        ("[slowdown]\na = 0.5", "slowdown.a"),
        ("[throttle]\na = { after_steps = -1, factor = 2 }", "after_steps"),
        ("[throttle]\na = { after_steps = 1, factor = 0.5 }", "factor"),
        ("[throttle]\na = { factor = 2 }", "after_steps"),
        ("speed = 1", "speed"),
        ("[[", "TOML"),
    ],
)
def test_bad_lab_files(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_lab(path)
