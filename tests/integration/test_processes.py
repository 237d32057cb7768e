"""Deaths and interruptions in the middle of work: what the others do, and that no process is left behind."""

from __future__ import annotations

import os
import signal
import time
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
from fusionai.training.checkpoint import CheckpointReader
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


IN_THE_BACKGROUND = (
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as a shell does for background jobs
    "from fusionai.cli.main import main\n"
    "sys.exit(main())\n"
)


@pytest.mark.parametrize("stopped_by", ["Ctrl-C", "SIGTERM", "SIGTERM in the background"])
def test_an_interrupted_owner_ends_its_step_and_keeps_it(
    small_pool: LocalPool, tmp_path: Path, stopped_by: str
) -> None:
    token, run_folder = small_pool.token, tmp_path / "run"
    script = None
    if "background" in stopped_by:
        script = tmp_path / "background.py"
        script.write_text(IN_THE_BACKGROUND, encoding="utf-8")
    with started(*train(small_pool, tmp_path), script=script) as owner:
        until_training(run_folder, owner)
        owner.send_signal(signal.SIGINT if stopped_by == "Ctrl-C" else signal.SIGTERM)
        ended = Ended(owner)
    done = steps_done(run_folder)
    kept = run_folder / "checkpoints" / f"step-{done:06d}"
    command = f"fusionai train --broker TOKEN --resume {run_folder}"
    texts = (f"interrupted after step {done} of ", f"the last good checkpoint is {kept}; go on with `{command}`")
    ended.failed(130, "KeyboardInterrupt", *texts)
    assert "stopping: the step under way ends" in ended.stderr
    assert token not in ended.stderr + ended.stdout, "it is a secret"
    CheckpointReader(kept).verify()
    job = last_job(token)
    assert (job.state, job.reason) == ("cancelled", "the owner cancelled it")
    until(lambda: all_free(token, *STEADY), what="an idle pool")
    more = ["--set", f"training.steps={done + 2}", "--json"]
    assert run("train", "--resume", run_folder, "--broker", token, *more).succeeded()["steps"] == 2


def test_a_second_interrupt_of_an_owner_ends_it_at_once(small_pool: LocalPool, tmp_path: Path) -> None:
    token = small_pool.token
    with started(*train(small_pool, tmp_path, "--set", "placement.compnodes=2")) as owner:
        until_training(tmp_path / "run", owner)
        stuck = psutil.Process(small_pool.pids[STEADY[0]])
        stuck.suspend()
        try:
            owner.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert owner.poll() is None, "it waits for the step"
            owner.send_signal(signal.SIGINT)
            ended = Ended(owner)
        finally:
            stuck.resume()
    ended.failed(130, "KeyboardInterrupt", "stopped at once")
    until(lambda: all_free(token, *STEADY), what="an idle pool")


def test_an_owner_that_is_interrupted_before_its_first_step_leaves_at_once(
    small_pool: LocalPool, tmp_path: Path
) -> None:
    """The text is packed in a thread; nobody waits until it is done."""
    reading = tmp_path / "reading"
    script = tmp_path / "slow_text.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "from fusionai.owner import language_model\n"
        "from fusionai.cli.main import main\n"
        "def pack_documents(documents, tokenizer, path):\n"
        f"    pathlib.Path({str(reading)!r}).touch()\n"
        "    time.sleep(100_000)\n"
        "language_model.pack_documents = pack_documents\n"
        "sys.exit(main())\n",
        encoding="utf-8",
    )
    with started(*train(small_pool, tmp_path), script=script) as owner:
        until(reading.exists, what="the reading of the text")
        owner.send_signal(signal.SIGINT)
        ended = Ended(owner)
    text = "interrupted before the first step was done; no checkpoint has been made yet"
    ended.failed(130, "KeyboardInterrupt", text)
    assert not (tmp_path / "run" / "job.toml").exists()


FROM_PYTHON = """
import json, sys, torch, fusionai
from pathlib import Path

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    def forward(self, features, labels):
        return torch.nn.functional.mse_loss(self.layers(features), labels)

def batch(step, index):
    generator = torch.Generator().manual_seed(step)
    return {"features": torch.randn(2, 4, generator=generator), "labels": torch.ones(2, 4)}

net = Net()
before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
try:
    fusionai.train(net, batch, broker=sys.argv[1], run=sys.argv[2], steps=10**6, privacy="open")
except KeyboardInterrupt as interrupt:
    same = all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
    print(json.dumps({"text": str(interrupt), "untouched": same}))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_program_gets_keyboard_interrupt_and_a_checkpoint(
    small_pool: LocalPool, tmp_path: Path, number: signal.Signals
) -> None:
    script, run_folder = tmp_path / "program.py", tmp_path / "run"
    script.write_text(FROM_PYTHON, encoding="utf-8")
    with started(small_pool.token, run_folder, script=script) as program:
        until_training(run_folder, program)
        program.send_signal(number)
        said = Ended(program).succeeded()
    done = steps_done(run_folder)
    kept = run_folder / "checkpoints" / f"step-{done:06d}"
    resuming = f"fusionai.train(..., resume={str(run_folder)!r})"
    assert said["untouched"]
    assert said["text"].startswith(f"interrupted after step {done} of ")
    assert said["text"].endswith(f"the last good checkpoint is {kept}; go on with `{resuming}`")
    CheckpointReader(kept).verify()
    until(lambda: all_free(small_pool.token, *STEADY), what="an idle pool")
    ended = run("train", "--resume", run_folder, "--broker", small_pool.token, "--json")
    ended.failed(2, "ConfigError", "was made through the Python API", resuming)


def test_a_second_owner_in_one_run_folder_is_refused(small_pool: LocalPool, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    with started(*train(small_pool, tmp_path, "--set", "training.checkpoint_every=1")) as owner:
        until_training(run_folder, owner)
        second = run("train", "--resume", run_folder, "--broker", small_pool.token, "--json")
        second.failed(2, "ConfigError", f"another owner trains in the run folder {run_folder} now")
        before = steps_done(run_folder)
        until(lambda: steps_done(run_folder) > before, what="a further step of the first")
        owner.kill()
        owner.wait(PATIENCE_S)
    until(lambda: all_free(small_pool.token, *STEADY), what="an idle pool")
    done = steps_done(run_folder)
    more = ["--set", f"training.steps={done + 2}", "--json"]
    assert run("train", "--resume", run_folder, "--broker", small_pool.token, *more).succeeded()["steps"] >= 2


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


def test_the_terminals_interrupt_is_for_the_owner_alone(tmp_path: Path) -> None:
    """Ctrl-C goes to every process of the terminal's foreground group. A pool that got it would end before the step."""
    pool = LocalPool(0, folder=tmp_path)
    with (tmp_path / "log").open("wb") as log:
        child = pool._start_command("broker", ["broker", "--json", "--state-dir", str(tmp_path / "state")], log)
    try:
        assert os.getpgid(child.pid) != os.getpgid(0)
    finally:
        child.kill()
        child.communicate(timeout=PATIENCE_S)


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
