"""What a machine offers, and the folder it keeps its state in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fusionai.compnode.state_folder import StateFolder
from fusionai.errors import ConfigError, StorageError
from fusionai.execution.plane import Calibration
from fusionai.execution.planes import plane
from fusionai.pool.device_measurement import measure, offered_memory


def test_measuring_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = plane("torch")
    first = measure(torch, device="cpu", threads=1, cache_folder=tmp_path, seconds=0.3)
    assert first.flops_per_s["matmul"] > 1e8
    assert first.memory_bytes_per_s > 1e8
    assert 0 < first.memory_bytes < psutil.virtual_memory().total
    calls: list[str] = []

    def counted(device: str, *, seconds: float = 2.0) -> Calibration:
        calls.append(device)
        return Calibration({"matmul": 1e9}, 1e9, 1e-5, 1e9)

    monkeypatch.setattr(torch, "calibrate", counted)
    again = measure(torch, device="cpu", threads=1, cache_folder=tmp_path, slowdown=4.0, memory_bytes=1 << 20)
    assert calls == []
    assert again.flops_per_s["matmul"] == first.flops_per_s["matmul"] / 4
    assert again.overhead_s == first.overhead_s * 4
    assert again.memory_bytes == 1 << 20
    measure(torch, device="cpu", threads=1, cache_folder=tmp_path, remeasure=True)
    assert calls == ["cpu"]
    (tmp_path / "calibration.json").write_text("{broken")
    measure(torch, device="cpu", threads=1, cache_folder=tmp_path)
    assert calls == ["cpu", "cpu"], "a broken cache is measured over"
    measure(torch, device="cpu", threads=1, cache_folder=tmp_path)
    assert calls == ["cpu", "cpu"]


def test_what_cannot_be_offered() -> None:
    torch = plane("torch")
    with pytest.raises(ConfigError, match=r"usable: .*cpu"):
        measure(torch, device="abacus")
    with pytest.raises(ConfigError, match="threads"):
        measure(torch, device="cpu", threads=0)
    with pytest.raises(ConfigError, match="slowdown"):
        measure(torch, device="cpu", threads=1, slowdown=0.5)
    with pytest.raises(ConfigError, match="more than cpu has"):
        offered_memory(torch, "cpu", 1 << 60)


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "a"):
        with pytest.raises(ConfigError, match="--state-dir"):
            StateFolder(tmp_path / "a")
        script = (
            "import sys; from pathlib import Path; from fusionai.compnode.state_folder import StateFolder\n"
            "print(StateFolder.first_free(Path(sys.argv[1])).path.name)"
        )
        with StateFolder.first_free(tmp_path / "many") as mine:
            found = subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / "many")], capture_output=True, check=True, timeout=250
            )
            assert (mine.path.name, found.stdout.strip()) == ("1", b"2")
    StateFolder(tmp_path / "a").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        StateFolder(tmp_path / "file" / "state")
