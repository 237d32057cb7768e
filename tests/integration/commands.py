"""What the integration tests need to work with commands as processes: starting, watching and judging them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from fusionai.network.identity import Identity
from fusionai.pool.member import MemberConfig, PoolMember
from fusionai.pool.messages import JobStatus, MemberStatus, Status, StatusQuery
from quick_pool import PATIENCE_S, start

ENDLESS = 1_000_000
"""Steps of a job that a test ends."""

Command = subprocess.Popen[str]


def tiny_job(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """Write a job file and its text: a Llama of three layers and width 32, which trains hundreds of steps a second.

    `changes` are tables with further fields, such as `training={"steps": 5}`.
    """
    text = folder / "text.txt"
    text.write_text(words(2400), encoding="utf-8")
    tables: dict[str, dict[str, Any]] = {
        "model.config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        "data": {"text": str(text), "vocabulary_size": 300, "sequence_length": 16},
        "training": {"steps": ENDLESS, "batch_size": 2, "microbatches": 2, "learning_rate": 1e-3},
    }
    for table, fields in changes.items():
        tables.setdefault(table, {}).update(fields)
    lines = ['name = "tiny"']
    for table, fields in tables.items():
        # What TOML and JSON have in common is all that these tables hold.
        lines += ["", f"[{table}]", *(f"{field} = {json.dumps(value)}" for field, value in fields.items())]
    path = folder / "job.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def words(count: int) -> str:
    """Return a text that is the same everywhere, twelve words a line."""
    chosen = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "omega", "pi", "rho"], k=count)
    return "\n".join(" ".join(chosen[start : start + 12]) for start in range(0, count, 12)) + "\n"


@contextmanager
def started(*arguments: str | Path, script: Path | None = None) -> Iterator[Command]:
    """Run `fusionai`, or a script, in the background; it is killed at the end if it still runs."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start([str(each) for each in arguments], script=script, **streams, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=PATIENCE_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


class Ended:
    """How a command ended."""

    def __init__(self, process: Command) -> None:
        """Wait for it. Fails when it takes longer."""
        self.stdout, self.stderr = process.communicate(timeout=PATIENCE_S)
        self.status = process.returncode

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object that ends its standard output."""
        assert self.stdout.strip(), self.stderr
        return dict(json.loads(self.stdout.strip().splitlines()[-1]))

    def succeeded(self) -> dict[str, Any]:
        """Require success, and return the result."""
        assert self.status == 0, self.stderr
        return self.result

    def failed(self, status: int, error: str, *texts: str) -> str:
        """Require an orderly failure with these words in its one line of error, and return that line."""
        assert self.status == status, (self.status, self.stdout, self.stderr)
        assert "Traceback" not in self.stderr, self.stderr
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.stderr
        assert self.stderr.rstrip().endswith(errors[0]), "the error is the last thing said"
        assert self.result["error"] == error, self.result
        assert errors[0] == f"error: {self.result['message']}"
        for text in texts:
            assert text in errors[0], f"{text!r} is not in {errors[0]!r}"
        return errors[0]


def run(*arguments: str | Path, script: Path | None = None) -> Ended:
    """Run a command to its end."""
    with started(*arguments, script=script) as process:
        return Ended(process)


def ready(process: Command) -> dict[str, Any]:
    """Return what a serving command says once it serves."""
    watch = threading.Timer(PATIENCE_S, process.kill)
    watch.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    watch.cancel()
    assert line, process.communicate(timeout=PATIENCE_S)
    return dict(json.loads(line))


def until(condition: Callable[[], bool], *, what: str = "it") -> None:
    """Wait until `condition()` holds."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < PATIENCE_S, f"{what} did not come about within {PATIENCE_S:g} s"
        time.sleep(0.05)


def steps_done(run_folder: Path) -> int:
    """Return how many steps a run has on record."""
    metrics = run_folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def until_training(run_folder: Path, process: Command, *, steps: int = 3) -> None:
    """Wait until a run has done some steps; fails at once when its process ends before."""

    def far_enough() -> bool:
        assert process.poll() is None, process.communicate(timeout=PATIENCE_S)
        return steps_done(run_folder) >= steps

    until(far_enough, what=f"step {steps}")


def pool_status(token: str) -> Status:
    """Ask a broker what its pool has and does."""

    async def ask() -> Status:
        member = PoolMember(Identity.ephemeral(), token, "observer", MemberConfig(name="observer"))
        await member.start()
        try:
            return await member.request(StatusQuery(), Status, timeout_s=PATIENCE_S)
        finally:
            await member.close()

    return asyncio.run(ask())


def compnodes(token: str) -> dict[str, MemberStatus]:
    """Return a pool's compnodes by name."""
    return {each.name: each for each in pool_status(token).compnodes}


def states(token: str) -> dict[str, str]:
    """Return the states of a pool's compnodes by name."""
    return {name: each.state for name, each in compnodes(token).items()}


def last_job(token: str) -> JobStatus:
    """Return the newest job of a pool."""
    return pool_status(token).jobs[-1]


def all_free(token: str, *names: str) -> bool:
    """Return whether these compnodes are idle and hold nothing of any job."""
    found = compnodes(token)
    return all(found[name].state == "idle" and not found[name].holds for name in names)


def family(pid: int) -> list[psutil.Process]:
    """Return the processes that a process has started, and theirs."""
    return psutil.Process(pid).children(recursive=True)


def all_end(processes: Iterable[psutil.Process]) -> None:
    """Require that processes end by themselves. What stays is killed."""
    _, alive = psutil.wait_procs(list(processes), timeout=PATIENCE_S)
    left = [f"{each.pid} {' '.join(each.cmdline())[:120]}" for each in alive if each.is_running()]
    for each in alive:
        each.kill()
    assert not left, f"orphans after {PATIENCE_S:g} s: {left}"


POSIX = os.name == "posix"
