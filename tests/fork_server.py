"""Starts FusionAI commands as processes that need not import torch again: they are forked from one that has.

A command spends about four seconds of a core on imports, and the tests start more than a hundred. The server imports
everything once, before it has any thread, and forks a process for each command: it has its own pid, pipes, signals and
exit status, and nothing else in common with the other ones. Tests of starting itself use `subprocess`.

Run as a program, this file is the server.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

AVAILABLE = hasattr(os, "fork") and hasattr(socket, "recv_fds") and sys.platform != "darwin"
"""macOS does not let its system libraries be used after a fork."""

_LONGEST_REQUEST_BYTES = 1 << 20


class ForkedProcess:
    """A command that runs, with the part of the interface of `subprocess.Popen` that the tests and LocalPool use."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        script: Path | None = None,
        stdin: int,
        stdout: int,
        stderr: int | IO[bytes],
        text: bool = False,
    ) -> None:
        """Start `fusionai` with these arguments, or a Python script.

        `stdin` is PIPE or DEVNULL, `stdout` is PIPE, and `stderr` is PIPE, STDOUT or an open file.
        """
        self.args = list(arguments)
        self.returncode: int | None = None
        self._text = text
        self._collected: dict[str, bytes] = {}
        self._readers: list[threading.Thread] = []
        self.stdin, in_end = _pipe("w", text) if stdin == subprocess.PIPE else (None, os.open(os.devnull, os.O_RDONLY))
        self.stdout, out_end = _pipe("r", text)
        self.stderr: IO[Any] | None = None
        if stderr == subprocess.PIPE:
            self.stderr, error_end = _pipe("r", text)
        elif stderr == subprocess.STDOUT:
            error_end = os.dup(out_end)
        else:
            assert not isinstance(stderr, int)
            error_end = os.dup(stderr.fileno())
        self._status, theirs = socket.socketpair()
        request = {
            "arguments": self.args,
            "script": str(script) if script else None,
            "folder": str(Path.cwd()),
            "environment": dict(os.environ),
        }
        ends = [in_end, out_end, error_end, theirs.fileno()]
        socket.send_fds(_server(), [json.dumps(request).encode()], ends)
        for end in ends[:3]:
            os.close(end)
        theirs.close()
        self._said = b""
        while b"\n" not in self._said:
            self._said += self._status.recv(100) or b"0\n"
        first, _, self._said = self._said.partition(b"\n")
        self.pid = int(first)
        assert self.pid, "the fork server has ended"

    def poll(self) -> int | None:
        """Return the exit status (a signal as its negative number) or None while the command runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status. Raises subprocess.TimeoutExpired."""
        until_s = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            if not select.select([self._status], [], [], left_s)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            data = self._status.recv(100)
            self._said += data
            if not data or self._said.endswith(b"\n"):
                self.returncode = int(self._said or b"-9")
                self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Read standard output and error to their ends, wait, and return both. Raises subprocess.TimeoutExpired."""
        until_s = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            for name, stream in (("stdout", self.stdout), ("stderr", self.stderr)):
                if stream is not None:
                    self._readers.append(threading.Thread(target=self._collect, args=(name, stream), daemon=True))
                    self._readers[-1].start()
        for reader in self._readers:
            reader.join(None if until_s is None else max(0.0, until_s - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if until_s is None else max(0.0, until_s - time.monotonic()))
        return self._collected.get("stdout"), self._collected.get("stderr")

    def _collect(self, name: str, stream: IO[Any]) -> None:
        self._collected[name] = stream.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)


def _pipe(mode: str, text: bool) -> tuple[IO[Any], int]:
    """Return this side of a new pipe as a file, and the other side as a descriptor."""
    reading, writing = os.pipe()
    ours, theirs = (reading, writing) if mode == "r" else (writing, reading)
    if text:
        return os.fdopen(ours, mode, encoding="utf-8"), theirs
    return os.fdopen(ours, f"{mode}b", -1 if mode == "r" else 0), theirs


@functools.cache
def _server() -> socket.socket:
    """Return the connection to this process's server, which ends, with all that it forked, when this process does."""
    ours, theirs = socket.socketpair()
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    theirs.close()
    atexit.register(ours.close)
    return ours


# --- the server -------------------------------------------------------------------------------------------------------


def _import_everything() -> None:
    """Import what commands import, without running any of it."""
    import fusionai

    for module in pkgutil.walk_packages(fusionai.__path__, "fusionai."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    for name in ("transformers.models.llama.modeling_llama", "torch.optim", "torch._dynamo"):
        importlib.import_module(name)


def _serve(control: socket.socket) -> dict[str, Any]:
    """Fork a process for each request until `control` is closed; returns in the forked processes only."""
    woken, waker = socket.socketpair()
    woken.setblocking(False)
    waker.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # An interrupt of the test run is for the tests to pass on.
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([control, woken], [], [])
        if woken in readable:
            woken.recv(4096)
            _report_ended(running)
        if control not in readable:
            continue
        message, ends, _, _ = socket.recv_fds(control, _LONGEST_REQUEST_BYTES, 4)
        if not message:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        request: dict[str, Any] = json.loads(message)
        status = socket.socket(fileno=ends.pop())
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for each in (control, woken, waker, status, *running.values()):
                each.close()
            for number, end in enumerate(ends):
                os.dup2(end, number)
                os.close(end)
            return request
        for end in ends:
            os.close(end)
        running[pid] = status
        status.sendall(b"%d\n" % pid)


def _report_ended(running: dict[int, socket.socket]) -> None:
    """Collect the processes that have ended, and tell the tests how."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as connection:
            try:
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            except OSError:
                pass  # Nobody waits for it any more.


def _run(request: dict[str, Any]) -> int:
    """Be the command."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["script"]:
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
        return 0
    from fusionai.cli.main import main

    sys.argv = ["fusionai", *request["arguments"]]
    return main()


def _end(request: dict[str, Any]) -> NoReturn:
    """Be the command, and end as a program does, but without taking all that is imported to pieces: that is seconds."""
    status = 1
    try:
        status = _run(request)
    except SystemExit as error:
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _import_everything()
    assert threading.active_count() == 1, "a fork takes one thread along, and the locks of all"
    gc.freeze()  # what is imported is never collected: looking at it would copy its pages into each process
    _end(_serve(socket.socket(fileno=int(sys.argv[1]))))
