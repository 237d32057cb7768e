"""Local pools that start quickly: their processes are forked, and this machine is measured once for all of them."""

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
from fusionai.owner.local_pool import LocalPool

_MEASURED = ("calibration.json", "disk.json")
_MEASURE = """
import sys
from pathlib import Path
from fusionai.compnode.disk import measure_disk
from fusionai.execution.planes import plane
from fusionai.pool.device_measurement import measure

measure(plane("torch"), threads=1, cache_folder=Path(sys.argv[1]))
measure_disk(Path(sys.argv[1]))
"""


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


class QuickPool(LocalPool):
    """A local pool as `fusionai.local_pool` makes it, of processes that start in a tenth of a second."""

    def _start_command(self, name: str, arguments: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
        if arguments[0] == "join":
            keep_measurements(self.folder / name)
        return start(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)


def keep_measurements(state_folder: Path) -> None:
    """Have a compnode with one thread and this state folder find this machine measured already."""
    state_folder.mkdir(parents=True, exist_ok=True)
    for name in _MEASURED:
        made = Path(_measurements().name) / name
        if made.exists() and not (state_folder / name).exists():
            shutil.copy(made, state_folder)


@functools.cache
def _measurements() -> tempfile.TemporaryDirectory[str]:
    """Measure this machine, once for each process that runs tests, and return the folder of the results."""
    folder = tempfile.TemporaryDirectory(prefix="fusionai-measured-")
    script = Path(folder.name) / "measure.py"
    script.write_text(_MEASURE, encoding="utf-8")
    if AVAILABLE:
        measuring = ForkedProcess(
            [folder.name], script=script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        said, _ = measuring.communicate(timeout=100)
        assert measuring.returncode == 0, said.decode()
    return folder
