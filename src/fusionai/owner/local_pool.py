"""A pool on this machine: a broker and compnodes as child processes, for the demo, examples and tests.

The children watch the pipe to their parent, so they end when it ends, even if it is killed.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fusionai.errors import JobError

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 300.0
"""Seconds that a child may take to import torch and to measure the machine, when the machine is busy."""

_STOP_TIMEOUT_S = 10.0

# A terminal's Ctrl-C goes to a whole group of processes. It is for the owner, which ends its step first.
_OWN_GROUP: dict[str, Any] = (
    {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    if sys.platform == "win32"
    else {"process_group": 0}
)


@dataclass(frozen=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class LocalPool:
    """Use as a context manager; `token` is the pool's join token."""

    def __init__(
        self,
        compnodes: int = 2,
        *,
        threads: int = 1,
        names: Sequence[str] | None = None,
        arguments: Sequence[Sequence[str]] | None = None,
        folder: Path | None = None,
        lab: Path | None = None,
    ) -> None:
        """`arguments` are further `fusionai join` arguments for each compnode; `folder` keeps states and logs."""
        if compnodes < 0:
            raise ValueError(f"compnodes must be >= 0, got {compnodes}")
        self.token = ""
        self._names = list(names or [f"compnode-{number}" for number in range(1, compnodes + 1)])
        self._arguments = [list(each) for each in arguments or [[] for _ in self._names]]
        self._threads = threads
        self._lab = lab
        self._temporary = tempfile.TemporaryDirectory(prefix="fusionai-pool-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or ".")
        self._children: list[_Child] = []

    def __enter__(self) -> LocalPool:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, the broker's included."""
        return {child.name: child.process.pid for child in self._children}

    def kill(self, name: str) -> None:
        """Kill one process at once (SIGKILL where there are signals)."""
        next(child for child in self._children if child.name == name).process.kill()

    def _start(self) -> None:
        lab = ["--lab", str(self._lab)] if self._lab else []
        broker = self._spawn("broker", ["broker", "--json", "--state-dir", str(self.folder / "broker"), *lab])
        assert broker.process.stdout is not None
        self.token = str(_first_json_line(broker, broker.process.stdout)["token"])
        joined = []
        for name, arguments in zip(self._names, self._arguments, strict=True):
            options = ["--name", name, "--threads", str(self._threads), "--listen", "127.0.0.1:0"]
            state = ["--state-dir", str(self.folder / name)]
            joined.append(self._spawn(name, ["join", self.token, "--json", *options, *state, *lab, *arguments]))
        for child in joined:
            assert child.process.stdout is not None
            _first_json_line(child, child.process.stdout)

    def _spawn(self, name: str, arguments: Sequence[str]) -> _Child:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.log"
        with path.open("wb") as file:
            process = self._start_command(name, [*arguments, "--exit-with-parent"], file)
        child = _Child(name, process, path)
        self._children.append(child)
        return child

    def _start_command(self, name: str, arguments: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start `fusionai` with these arguments, its standard input and output piped; tests start it otherwise."""
        return subprocess.Popen(
            [sys.executable, "-m", "fusionai", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            **_OWN_GROUP,
        )

    def close(self) -> None:
        """End every child: close its pipe, and kill it if it does not end by itself."""
        for child in reversed(self._children):
            if child.process.stdin is not None:
                child.process.stdin.close()
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        for child in self._children:
            try:
                child.process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("%s did not end by itself and is killed", child.name)
                child.process.kill()
                child.process.wait()
            if child.process.stdout is not None:
                child.process.stdout.close()
        self._children.clear()
        if self._temporary is not None:
            self._temporary.cleanup()


def _first_json_line(child: _Child, stream: IO[bytes]) -> dict[str, object]:
    """Return the line by which a child says that it is ready. Raises JobError with the end of its log."""
    watch = threading.Timer(_START_TIMEOUT_S, child.process.kill)
    watch.start()
    try:
        line = stream.readline()
    finally:
        watch.cancel()
    try:
        found = json.loads(line)
        if isinstance(found, dict) and "error" not in found:
            return found
    except ValueError:
        pass
    try:
        child.process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.process.kill()  # a busy machine may take longer; what is wrong has been said
        child.process.wait()
    tail = child.log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise JobError(f"{child.name} did not start: {line.decode(errors='replace').strip()}\n{tail}".strip())
