"""The commands as processes, over real sockets: join, status, leave, die, restart, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest

from fusionai.network.identity import Identity
from fusionai.network.token import JoinToken
from quick_pool import PATIENCE_S, completed, keep_measurements, start

COMMAND = [sys.executable, "-m", "fusionai"]
POSIX = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


class Running:
    """A command that serves until stopped."""

    def __init__(self, *arguments: str, log: Path, as_users_do: bool) -> None:
        self.log = log
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with log.open("ab") as file:
            if as_users_do:
                self.process = subprocess.Popen([*COMMAND, *arguments, "--json"], stderr=file, **streams)
            else:
                self.process = start([*arguments, "--json"], stderr=file, **streams)

    @cached_property
    def ready(self) -> dict[str, Any]:
        """What it says when it serves; waits for that."""
        watch = threading.Timer(PATIENCE_S, self.process.kill)
        watch.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        watch.cancel()
        assert line, self.log.read_text(encoding="utf-8", errors="replace")
        return dict(json.loads(line))

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; asking takes a command."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, what


def last_object(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


def compnodes(token: str) -> dict[str, dict[str, Any]]:
    result = completed("status", "--broker", token, "--json")
    assert result.returncode == 0, result.stderr
    return {each["name"]: each for each in last_object(result)["compnodes"]}


def states(token: str) -> dict[str, str]:
    return {name: each["state"] for name, each in compnodes(token).items()}


class Place:
    """A folder in which a test's processes live.

    Those that are not started `as_users_do` are forked, and find this machine measured already.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[Running] = []

    def broker(self, *arguments: str, name: str = "broker", as_users_do: bool = False) -> Running:
        words = ["broker", "--state-dir", str(self._folder / name), *arguments]
        return self._start(*words, name=name, as_users_do=as_users_do)

    def join(self, token: str, name: str, *arguments: str, as_users_do: bool = False) -> Running:
        state = self._folder / name
        if not as_users_do:
            keep_measurements(state)
        words = ["join", token, "--name", name, "--threads", "1", "--state-dir", str(state), *arguments]
        return self._start(*words, name=name, as_users_do=as_users_do)

    def _start(self, *arguments: str, name: str, as_users_do: bool) -> Running:
        running = Running(*arguments, log=self._folder / f"{name}.log", as_users_do=as_users_do)
        self._running.append(running)
        return running

    def close(self) -> None:
        for each in self._running:
            each.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.close()


@POSIX
def test_a_pool_from_join_to_restart(place: Place) -> None:
    broker = place.broker(as_users_do=True)
    token = broker.ready["token"]
    address = broker.ready["address"]
    assert address.startswith("127.0.0.1:")
    polite = place.join(token, "polite", as_users_do=True)
    doomed, third = place.join(token, "doomed"), place.join(token, "third")
    assert polite.ready["device"]["threads"] == 1
    assert polite.ready["device"]["flops_per_s"]["matmul"] > 1e8
    assert not any(each.ready["lab"] for each in (polite, doomed, third))
    assert states(token) == dict.fromkeys(["polite", "doomed", "third"], "idle")

    shown = completed("status", "--broker", token)
    assert shown.returncode == 0
    assert "doomed" in shown.stdout

    assert polite.end(signal.SIGINT) == 0
    doomed.process.kill()
    until(lambda: states(token)["doomed"] == "lost", "the loss of a killed compnode")
    assert states(token) == {"polite": "left", "doomed": "lost", "third": "idle"}
    known = compnodes(token)
    history = {name: (each["availability"]["losses"], each["availability"]["leaves"]) for name, each in known.items()}
    assert history == {"polite": (0, 1), "doomed": (1, 0), "third": (0, 0)}
    assert known["third"]["disk"]["free_bytes"] > 0
    assert known["third"]["access"]["up_bytes_per_s"] > 0

    broker.process.kill()
    broker.process.wait(10)
    broker = place.broker()
    assert broker.ready["address"] == address
    until(lambda: states(token)["third"] == "idle", "a compnode comes back by itself")
    assert states(token) == {"polite": "left", "doomed": "lost", "third": "idle"}
    assert third.end(signal.SIGTERM) == 0
    assert broker.end(signal.SIGTERM) == 0


def test_what_is_refused(place: Place, tmp_path: Path) -> None:
    broker = place.broker()
    token = JoinToken.decode(broker.ready["token"])
    forged = JoinToken.issue(Identity.ephemeral(), token.addresses)
    expired = place.broker("--token-hours", "0.0000001", name="brief").ready["token"]
    bad = broker.ready["token"][:-8] + "AAAAAAAA"
    port = broker.ready["address"].rpartition(":")[2]
    for arguments, error, text, status in (
        (("status", "--broker", "nonsense"), "TokenError", "malformed", 2),
        (("status", "--broker", bad), "TokenError", "forged", 2),
        (("status", "--broker", expired), "TokenError", "expired", 2),
        (("status", "--broker", forged.encode()), "AuthenticationError", "was to be reached", 5),
        (("join", "nonsense", "--state-dir", str(tmp_path / "x")), "TokenError", "malformed", 2),
        (("join", "x", "--memory", "lots", "--state-dir", str(tmp_path / "x")), "ConfigError", "memory", 2),
        (("broker", "--port", port, "--state-dir", str(tmp_path / "y")), "ConfigError", f"port {port}", 2),
        (("broker", "--state-dir", str(tmp_path / "broker")), "StorageError", "in use by another broker", 4),
        (("broker", "--lab", str(tmp_path / "none.toml")), "ConfigError", "does not exist", 2),
        (("broker", "--prot", "1"), "ConfigError", "fusionai", 2),
        (("fly",), "ConfigError", "invalid choice", 2),
    ):
        result = completed(*arguments, "--json")
        assert result.returncode == status, (arguments, result)
        found = last_object(result)
        assert found["error"] == error, found
        assert text in found["message"], found
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in result.stderr
    broker.close()
    result = completed("status", "--broker", token.encode(), "--json")
    assert (result.returncode, last_object(result)["error"]) == (5, "PeerLost")


@POSIX
def test_no_orphans_when_the_parent_is_killed(place: Place, tmp_path: Path) -> None:
    token = place.broker().ready["token"]
    script = (
        "import subprocess, sys, time\n"
        "options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "command = [sys.executable, '-m', 'fusionai']\n"
        "last = ['--exit-with-parent', '--json']\n"
        "children = [subprocess.Popen([*command, *each.split('|'), *last], **options) for each in sys.argv[1:]]\n"
        "for child in children[:-1]: child.stdout.readline()\n"
        "print(*(child.pid for child in children), flush=True)\n"
        "time.sleep(1000)\n"
    )
    keep_measurements(tmp_path / "child")
    children = [
        f"broker|--state-dir|{tmp_path / 'own'}",
        f"join|{token}|--name|child|--threads|1|--state-dir|{tmp_path / 'child'}",
        f"join|{token}|--name|late|--threads|1|--state-dir|{tmp_path / 'late'}",  # still importing when it happens
    ]
    parent = subprocess.Popen([sys.executable, "-c", script, *children], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    assert all(psutil.pid_exists(pid) for pid in pids)
    assert states(token)["child"] == "idle"
    parent.kill()
    parent.wait(PATIENCE_S)
    parent.stdout.close()
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=PATIENCE_S)
    assert not alive
    assert states(token)["child"] == "left", "it even took leave"


@POSIX
def test_a_second_interrupt_ends_at_once(place: Place) -> None:
    broker = place.broker()
    joined = place.join(broker.ready["token"], "stubborn")
    assert joined.ready["name"] == "stubborn"
    # A broker that does not answer the farewell any more keeps the leaving compnode waiting.
    broker.process.send_signal(signal.SIGSTOP)
    joined.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert joined.process.poll() is None
    assert joined.end(signal.SIGINT) == 130
    broker.process.send_signal(signal.SIGCONT)


def test_lab_mode_is_told(place: Place, tmp_path: Path) -> None:
    lab = tmp_path / "lab.toml"
    lab.write_text('default = "lan"\n[links]\n"slow<->broker" = { one_way_ms = 20 }\n[slowdown]\nslow = 3.0\n')
    token = place.broker("--lab", str(lab)).ready["token"]
    slow, plain = place.join(token, "slow", "--lab", str(lab)), place.join(token, "plain")
    assert (slow.ready["lab"], plain.ready["lab"]) == (True, False)
    speeds = [each.ready["device"]["flops_per_s"]["matmul"] for each in (slow, plain)]
    assert speeds[0] == pytest.approx(speeds[1] / 3)

    def links() -> dict[tuple[str, str], Any]:
        shown = last_object(completed("status", "--broker", token, "--json"))["links"]
        return {(each["source"], each["target"]): each["profile"] for each in shown}

    until(lambda: len(links()) == 6, "probes of all links")
    found = last_object(completed("status", "--broker", token, "--json"))
    assert {each["name"]: each["lab"] for each in found["compnodes"]} == {"slow": True, "plain": False}
    assert links()["slow", "broker"]["rtt_s"] >= 0.0395, "this way takes 20 ms, and so does the way back"
