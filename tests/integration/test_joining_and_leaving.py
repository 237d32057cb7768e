"""Compnodes join and leave while a job trains: stages move to them and away, and what is computed stays the same."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import PATIENCE_S, POSIX, Ended, compnodes, last_job, started, states, tiny_job, until, until_training
from models import language_model, named_parts, token_batch, train_alone

import fusionai
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.membership import OwnerOptions
from fusionai.owner.replan_event import ReplanEvent
from fusionai.owner.training_job import Observer, StepEvent
from fusionai.scheduling.recovery import Patience
from fusionai.training.corrections import Corrections
from quick_pool import QuickPool, keep_measurements, start

STEPS = 80
HURRIED = 45
"""Steps by which it all should have happened; later ones wait longer for it, on a machine that is busy."""

SLOW = ["--slowdown", "12"]
ADAMW: dict[str, Any] = {"kind": "adamw", "weight_decay": 0.01}


class Visit(Observer):
    """Has a fast compnode join at the second step, and asks it to leave as soon as it has work."""

    def __init__(self, pool: LocalPool) -> None:
        self.losses: list[float] = []
        self.events: list[ReplanEvent] = []
        self.over = threading.Event()
        """Set when the visitor has left again."""
        self.visitor: subprocess.Popen[str] | None = None
        self._pool = pool

    def stepped(self, event: StepEvent) -> None:
        self.losses.append(event.loss)
        if len(self.losses) == 2:
            folder = self._pool.folder / "visitor"
            keep_measurements(folder)
            command = ["join", self._pool.token, "--name", "visitor", "--threads", "1", "--state-dir", str(folder)]
            streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self.visitor = start(command, stdin=subprocess.DEVNULL, **streams, text=True)

    def replanned(self, event: ReplanEvent) -> None:
        self.events.append(event)
        assert self.visitor is not None
        uses = "visitor" in {each.name for each in event.machines}
        if uses and not any("wants to leave" in each.reason for each in self.events):
            self.visitor.send_signal(signal.SIGTERM)
        elif not uses and len(self.events) > 1:
            self.over.set()


@pytest.mark.skipif(not POSIX, reason="sends POSIX signals")
def test_a_fast_compnode_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However fast the machine is, there is time left for another plan.
    monkeypatch.setattr("fusionai.scheduling.recovery.PATIENCE", Patience(least_left_s=0.0, pause_steps=2))
    monkeypatch.setattr(Corrections, "drifted", lambda _: ())  # the subject of test_drift
    torch.set_num_threads(1)
    content = token_batch("llama", 2, 16)
    with QuickPool(names=["slow-1", "slow-2"], arguments=[SLOW, SLOW], folder=tmp_path / "pool") as pool:
        visit = Visit(pool)

        def batch(step: int, index: int) -> Any:
            if not visit.over.is_set():
                time.sleep(0.05 if step < HURRIED else 1.5)
            return content(step, index)

        together = language_model("llama")
        result = fusionai.train(
            together,
            batch,
            broker=pool.token,
            steps=STEPS,
            microbatches=2,
            learning_rate=1e-3,
            optimizer=OptimizerConfig(**ADAMW),
            gradient_clip=0.5,
            privacy="open",
            run=tmp_path / "run",
            owner=OwnerOptions(token=pool.token),
            observer=visit,
        )
        assert visit.visitor is not None
        log, _ = visit.visitor.communicate(timeout=PATIENCE_S)
        assert visit.visitor.returncode == 0
        assert "leaving: others take " in log
        assert "left with a part" not in log
        assert states(pool.token)["visitor"] == "left"
        assert last_job(pool.token).state == "finished"
    came, went = visit.events
    assert "visitor" in {each.name for each in came.machines}
    assert came.reason.startswith("visitor joined; a step takes ")
    assert went.reason.startswith("visitor wants to leave; visitor leaves; ")
    assert (came.error, went.error) == (None, None)
    assert "visitor" not in {each.name for each in went.machines}
    assert came.bytes_moved > 0
    assert went.bytes_moved > 0
    assert result.replans == 2
    alone = language_model("llama")
    expected = train_alone(
        alone, content, steps=STEPS, microbatches=2, optimizer=ADAMW, learning_rate=1e-3, gradient_clip=0.5
    )
    assert visit.losses == pytest.approx(expected, rel=1e-5)
    reference = named_parts(alone.state_dict())
    for key, tensor in named_parts(together.state_dict()).items():
        assert torch.allclose(tensor, reference[key], rtol=1e-3, atol=1e-6), key


@pytest.mark.skipif(not POSIX, reason="sends POSIX signals")
def test_a_compnode_that_nobody_can_replace_leaves_all_the_same(tmp_path: Path) -> None:
    """It is told at once that it cannot be relieved, and the job ends with its name."""
    job = tiny_job(tmp_path, placement={"compnodes": 1})
    with QuickPool(1, folder=tmp_path / "pool") as pool:
        with started("train", job, "--broker", pool.token, "--run", tmp_path / "run", "--json") as owner:
            until_training(tmp_path / "run", owner)
            os.kill(pool.pids["compnode-1"], signal.SIGTERM)
            ended = Ended(owner)  # within much less than the 5 min that it would wait
        ended.failed(6, "JobError", "compnode compnode-1 (stage ", "it left the pool (its provider stopped it)")
        until(lambda: compnodes(pool.token)["compnode-1"].state == "left", what="the leaving compnode")
        log = (pool.folder / "compnode-1.log").read_text()
        assert "leaving: others take " in log
        assert "left with a part in a job: job tiny cannot go on without it: " in log


@pytest.mark.skipif(not POSIX, reason="sends POSIX signals")
def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, placement={"compnodes": 1, "machines": ["compnode-1"]})
    with QuickPool(1, folder=tmp_path / "pool") as pool:
        with started("train", job, "--broker", pool.token, "--run", tmp_path / "run", "--json") as owner:
            until_training(tmp_path / "run", owner)
            log = pool.folder / "compnode-1.log"
            leaving = psutil.Process(pool.pids["compnode-1"])
            # An owner that is stopped answers nothing, so that the machine waits.
            owner.send_signal(signal.SIGSTOP)
            leaving.send_signal(signal.SIGTERM)
            until(lambda: "leaving: others take " in log.read_text(), what="the wish to leave")
            time.sleep(0.3)
            assert leaving.is_running()
            assert "left with" not in log.read_text()
            leaving.send_signal(signal.SIGTERM)
            until(lambda: "stopped at once" in log.read_text(), what="the end of the leaving compnode")
            owner.send_signal(signal.SIGCONT)
            ended = Ended(owner)
        ended.failed(6, "JobError", "compnode-1")
