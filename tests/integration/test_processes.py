"""Deaths and interruptions in the middle of work: what the others do, and that no process is left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import (
    PATIENCE_S,
    POSIX,
    Command,
    Ended,
    all_end,
    all_free,
    family,
    last_job,
    ready,
    run,
    started,
    states,
    steps_done,
    tiny_job,
    until,
    until_training,
    words,
)

import fusionai
from fusionai.errors import JobError
from fusionai.owner.local_pool import LocalPool
from quick_pool import QuickPool, keep_measurements

pytestmark = pytest.mark.skipif(not POSIX, reason="sends POSIX signals")

STEADY = ("steady-1", "steady-2")


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPool]:
    """A broker and two compnodes that outlive every test of this module."""
    with QuickPool(2, names=STEADY, folder=tmp_path_factory.mktemp("small-pool")) as pool:
        yield pool


def train(pool: LocalPool, folder: Path, *options: str) -> list[str | Path]:
    """Return the arguments of a run of the tiny job, into folder/run."""
    return ["train", tiny_job(folder), "--broker", pool.token, "--run", folder / "run", "--json", *options]


def test_a_killed_compnode_ends_its_job_and_nothing_else(small_pool: LocalPool, tmp_path: Path) -> None:
    token = small_pool.token
    state = tmp_path / "state"
    keep_measurements(state)
    joining = ["join", token, "--name", "doomed", "--threads", "1", "--state-dir", state, "--json"]
    with started(*joining) as doomed:
        assert ready(doomed)["name"] == "doomed"
        with started(*train(small_pool, tmp_path, "--set", "placement.compnodes=3")) as owner:
            until_training(tmp_path / "run", owner)
            assert states(token) == dict.fromkeys([*STEADY, "doomed"], "working")
            doomed.kill()
            ended = Ended(owner)
    line = ended.failed(6, "JobError", "compnode doomed (stage ", "is lost", "no checkpoint has been made yet")
    assert not any(name in line for name in STEADY)

    until(lambda: all_free(token, *STEADY), what="an idle pool")
    assert states(token)["doomed"] == "lost"
    job = last_job(token)
    assert (job.state, "doomed" in job.reason) == ("failed", True)

    second = tmp_path / "second"
    second.mkdir()
    result = run(*train(small_pool, second, "--set", "training.steps=3")).succeeded()
    assert result["steps"] == 3
    assert set(result["compnodes"]) <= {"owner", *STEADY}


def test_a_killed_owner_leaves_its_compnodes_free(small_pool: LocalPool, tmp_path: Path) -> None:
    token = small_pool.token
    with started(*train(small_pool, tmp_path, "--set", "placement.compnodes=2")) as owner:
        until_training(tmp_path / "run", owner)
        assert {states(token)[name] for name in STEADY} == {"working"}
        owner.kill()
        owner.wait(PATIENCE_S)
        until(lambda: all_free(token, *STEADY), what="an idle pool")
        until(lambda: last_job(token).state == "failed", what="the end of the job")
    assert "owner owner is lost" in last_job(token).reason


def test_an_interrupted_owner_ends_its_job(small_pool: LocalPool, tmp_path: Path) -> None:
    token = small_pool.token
    with started(*train(small_pool, tmp_path)) as owner:
        until_training(tmp_path / "run", owner)
        owner.send_signal(signal.SIGINT)
        ended = Ended(owner)
    ended.failed(130, "KeyboardInterrupt", "interrupted")
    job = last_job(token)
    assert (job.state, job.reason) == ("cancelled", "the owner cancelled it")
    until(lambda: all_free(token, *STEADY), what="an idle pool")


def start_demo(folder: Path) -> list[str | Path]:
    text = folder / "text.txt"
    text.write_text(words(6000), encoding="utf-8")
    return ["demo", "--text", text, "--compnodes", "1", "--steps", "100000", "--run", folder / "run", "--json"]


def children_of_demo(demo: Command) -> list[psutil.Process]:
    """Return the broker and the compnode of a demo, as soon as both are there."""
    until(lambda: len(family(demo.pid)) == 2, what="the demo's broker and compnode")
    return family(demo.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_demo_that_is_stopped_leaves_nobody(tmp_path: Path, number: signal.Signals) -> None:
    with started(*start_demo(tmp_path)) as demo:
        children = children_of_demo(demo)
        until_training(tmp_path / "run", demo, steps=1)
        demo.send_signal(number)
        ended = Ended(demo)
    all_end(children)
    if number == signal.SIGKILL:
        assert ended.status == -signal.SIGKILL
    else:
        ended.failed(130, "KeyboardInterrupt", "interrupted")


def test_a_demo_that_is_interrupted_while_it_starts(tmp_path: Path) -> None:
    with started(*start_demo(tmp_path)) as demo:
        children = children_of_demo(demo)
        assert steps_done(tmp_path / "run") == 0
        demo.send_signal(signal.SIGINT)
        Ended(demo).failed(130, "KeyboardInterrupt", "interrupted")
    all_end(children)


def test_a_local_pool_ends_with_its_killed_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time, fusionai\n"
        "from pathlib import Path\n"
        "with fusionai.local_pool(1, folder=Path(sys.argv[1])) as pool:\n"
        "    print('{\"up\": true}', flush=True)\n"
        "    time.sleep(1000)\n"
    )
    program = tmp_path / "parent.py"
    program.write_text(script, encoding="utf-8")
    keep_measurements(tmp_path / "pool" / "compnode-1")
    with started(tmp_path / "pool", script=program) as parent:
        assert ready(parent)["up"]
        children = family(parent.pid)
        assert len(children) == 2
        parent.kill()
        parent.wait(PATIENCE_S)
        all_end(children)


def test_an_exception_inside_a_local_pool_leaves_nobody(tmp_path: Path) -> None:
    children: list[psutil.Process] = []
    keep_measurements(tmp_path / "compnode-1")

    def fail() -> None:
        with fusionai.local_pool(1, folder=tmp_path) as pool:
            children.extend(psutil.Process(pid) for pid in pool.pids.values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(children) == 2
    assert not any(child.is_running() for child in children), "all have ended when the block is left"


def test_a_local_pool_that_cannot_start_leaves_nobody(tmp_path: Path) -> None:
    before = family(psutil.Process().pid)
    with (
        pytest.raises(JobError, match=r"compnode-1 did not start: .*abacus"),
        LocalPool(1, arguments=[["--device", "abacus"]], folder=tmp_path),
    ):
        pass
    assert set(family(psutil.Process().pid)) <= set(before)
