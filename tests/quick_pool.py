"""Local pools that start quickly: their processes are forked, and the speed of this machine is not measured.

Run as a program, this file writes what compnodes would have measured: `python quick_pool.py FOLDER`.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from fork_server import AVAILABLE, ForkedProcess
from fusionai.compnode.disk import measure_disk
from fusionai.execution import planes
from fusionai.execution.plane import Calibration
from fusionai.owner.local_pool import LocalPool
from fusionai.pool.device_measurement import measure

PATIENCE_S = 250.0
"""For anything that a test waits for: a busy machine may take long, and only a test that fails waits to the end."""

_SPEEDS = Calibration(
    flops_per_s={
        "matmul": 4e10,
        "attention": 3e10,
        "convolution": 4e10,
        "matmul.bf16": 3e9,
        "attention.bf16": 3e9,
    },
    memory_bytes_per_s=4e9,
    overhead_s=3e-5,
    update_bytes_per_s=5e9,
)
"""About those of a server's core. Measuring takes seconds, and plans would vary with what else the machine does."""

_MEASURED = ("calibration.json", "disk.json")


def start(
    arguments: Sequence[str],
    *,
    script: Path | None = None,
    stdin: int,
    stdout: int,
    stderr: int | IO[bytes],
    text: bool = False,
) -> subprocess.Popen[Any]:
    """Start `fusionai` (or a script) with these arguments: forked where that is possible, else as a user would."""
    streams: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "text": text}
    if AVAILABLE:
        return ForkedProcess(arguments, script=script, **streams)  # type: ignore[return-value]
    program = [str(script)] if script else ["-m", "fusionai"]
    return subprocess.Popen([sys.executable, *program, *arguments], **streams)


def completed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `fusionai` with these arguments to its end."""
    pipe = subprocess.PIPE
    words = [str(each) for each in arguments]
    process = start(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


class QuickPool(LocalPool):
    """A local pool as `fusionai.local_pool` makes it, of processes that start in a tenth of a second."""

    def _start_command(self, name: str, arguments: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
        if arguments[0] == "join":
            keep_measurements(self.folder / name)
        return start(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)


def keep_measurements(state_folder: Path) -> None:
    """Have a compnode with one thread and this state folder find `_SPEEDS` as what it has measured before."""
    state_folder.mkdir(parents=True, exist_ok=True)
    for name in _MEASURED:
        made = Path(_measurements().name) / name
        if made.exists() and not (state_folder / name).exists():
            shutil.copy(made, state_folder)


@functools.cache
def _measurements() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the files that a measurement leaves; made once for each process that runs tests."""
    folder = tempfile.TemporaryDirectory(prefix="fusionai-measured-")
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    writing = start([folder.name], script=Path(__file__), **streams)
    said, _ = writing.communicate(timeout=PATIENCE_S)
    assert writing.returncode == 0, said.decode()
    return folder


def _write_measurements(folder: Path) -> None:
    torch = planes.plane("torch")
    torch.calibrate = lambda device, *, seconds=2.0: _SPEEDS  # type: ignore[method-assign]
    measure(torch, threads=1, cache_folder=folder)
    measure_disk(folder)


if __name__ == "__main__":
    _write_measurements(Path(sys.argv[1]))
