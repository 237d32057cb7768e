"""The training loop on scripted machines: when checkpoints are made, and what is kept when a job ends early.

Every checkpoint is compared, bit for bit, with one program for each machine that is called in a plain loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_plane import FakePlane, data
from scripted_pool import JOB, Point, ScriptedPool
from toy_pipelines import OPTIONS, OWNER, ROWS, WIDTH, Reference, Start, batch, three_machines

from fusionai.errors import DataError, JobError, StorageError
from fusionai.network.clock import now_s, run_scripted
from fusionai.owner.checkpointing import CheckpointFiles
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.stop_request import LEAST_PATIENCE_S, JobStopped, StopRequest
from fusionai.owner.training_job import Observer, StepEvent, TrainingJob, TrainingResult
from fusionai.owner.training_loop import TrainingLoop
from fusionai.training.checkpoint import CheckpointReader
from fusionai.training.compute import ProgramCall
from fusionai.training.config import TrainingConfig
from fusionai.training.data.batches import Batch
from fusionai.training.learning_rate import ScheduleConfig
from fusionai.training.loss_weights import LossWeights

MACHINES = (OWNER, "a", "b", "c")
RATE = 0.125
SECONDS = {"forward": 10.0, "backward": 20.0}
STEP_S = 120.0
"""Of two microbatches through three stages: (2 + 3 - 1) slots of 10 s + 20 s. Links add milliseconds."""


class Run:
    """A run of the toy job: what it saved and when, and what its batches and its observer do."""

    def __init__(self, folder: Path, *, steps: int = 10, **training: Any) -> None:
        self.folder = folder
        self.training = TrainingConfig(steps=steps, microbatches=2, learning_rate=RATE, **training)
        self.saved: list[str] = []
        self.saved_s: list[float] = []
        self.stopping = 0
        self.on_batch: Callable[[int], None] = lambda step: None
        self.on_step: Callable[[int], None] = lambda done: None
        self.spoilt: int | None = None
        """Step whose data has a NaN."""
        self.slow: dict[str, float] = {}
        """Seconds of each pass, of machines that are slower than the others."""
        self.stop: StopRequest | None = None

    # --- the data and the observer of the job

    def microbatch(self, step: int, index: int) -> Batch:
        self.on_batch(step)
        found = batch(step, 2)[index]
        if step == self.spoilt:
            found["y"] = replace(found["y"], data=data([float("nan")] * ROWS * WIDTH).data)
        return found

    def heldout(self) -> Sequence[Batch]:
        return []

    def observer(self) -> Observer:
        run = self

        class Hears(Observer):
            def stepped(self, event: StepEvent) -> None:
                run.on_step(event.step)

            def saved(self, path: str) -> None:
                run.saved.append(Path(path).name)
                run.saved_s.append(now_s())

            def stopping(self) -> None:
                run.stopping += 1

        return Hears()

    # --- running it

    def result(self, *, within: Callable[[ScriptedPool], None] = lambda pool: None) -> TrainingResult:
        """Run it on a scripted clock."""

        async def main() -> TrainingResult:
            async with ScriptedPool(*MACHINES, duration_s=self._duration_s) as pool:
                within(pool)
                return await asyncio.ensure_future(self._trained(pool))

        return run_scripted(main())

    def _duration_s(self, machine: str, call: ProgramCall) -> float:
        return self.slow.get(machine, SECONDS[call.kind]) if call.kind in SECONDS else 0.0

    async def _trained(self, pool: ScriptedPool) -> TrainingResult:
        pipeline = three_machines()
        driver = await pool.launch(pipeline)

        async def no_new_plan(done: int) -> None:
            return None

        running: Any = SimpleNamespace(driver=driver, names={}, lab=False, taken=0, job=JOB)
        running.observe, running.between_steps = lambda step, result: None, no_new_plan
        member: Any = SimpleNamespace(tell=lambda message: None)
        job = TrainingJob(
            name="toy",
            graph=pipeline.graph,
            weights=Start(),
            batches=self,
            files=CheckpointFiles(),
            tokens_per_step=1,
            description="",
            training=self.training,
            optimizer=OPTIONS.optimizer,
            schedule=ScheduleConfig(kind="constant"),
        )
        self.stop = StopRequest()
        alike = LossWeights(pipeline.graph, "equal", FakePlane(), job.weights)
        try:
            with RunFolder(self.folder) as folder:
                return await TrainingLoop(
                    job, pipeline.graph, running, member, folder, self.stop, self.observer(), alike, alike
                ).run()
        finally:
            self.stop.close()

    def ask_after(self, seconds: float) -> None:
        assert self.stop is not None
        asyncio.get_running_loop().call_later(seconds, self.stop.ask)

    # --- what it left

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def kept(self) -> list[str]:
        return sorted(each.name for each in self.checkpoint(0).parent.iterdir())

    def assert_exact(self, step: int) -> None:
        """Require that the checkpoint of a step holds what a plain loop computes, and nothing else."""
        reference = Reference(three_machines())
        for number in range(step):
            reference.train_step(batch(number, 2), [0.5, 0.5], RATE)
        reader = CheckpointReader(self.checkpoint(step))
        reader.verify()
        assert reader.manifest.step == step
        expected = {
            key if state is None else f"{key}::{state}": held for (key, state), held in reference.tensors().items()
        }
        assert {*reader.weights, *reader.states} == expected.keys()
        for name, held in expected.items():
            assert bytes(reader.read(name).data) == held, name


# --- checkpoints by time ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_made_when_the_minutes_are_over(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_minutes=5.0, keep_checkpoints=9)
    run.result()
    assert run.saved == ["step-000003", "step-000006", "step-000009", "step-000010"]
    assert run.saved_s[0] == pytest.approx(3 * STEP_S, rel=0.01)
    for step in (3, 6, 9, 10):
        run.assert_exact(step)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_minutes=5.0)
    run.result()
    assert run.kept() == ["step-000009", "step-000010"]


@pytest.mark.parametrize(
    ("fields", "saved"),
    [
        ({"checkpoint_minutes": 0.0}, [10]),
        ({}, [5, 10]),  # by default every 10 minutes
        ({"checkpoint_every": 4, "checkpoint_minutes": 0.0}, [4, 8, 10]),
        ({"checkpoint_every": 2, "checkpoint_minutes": 5.0}, [2, 4, 6, 8, 10]),  # each begins the minutes anew
        ({"checkpoint_every": 4, "checkpoint_minutes": 5.0}, [3, 4, 7, 8, 10]),
    ],
)
def test_steps_and_minutes(tmp_path: Path, fields: dict[str, Any], saved: list[int]) -> None:
    run = Run(tmp_path, **fields)
    run.result()
    assert run.saved == [f"step-{step:06d}" for step in saved]


# --- the owner stops it -----------------------------------------------------------------------------------------------


def test_a_stop_ends_the_step_and_keeps_it(tmp_path: Path) -> None:
    run = Run(tmp_path / "a run")
    run.on_step = lambda done: run.ask_after(STEP_S / 2) if done == 2 else None
    with pytest.raises(JobStopped) as caught:
        run.result()
    assert str(caught.value) == (
        f"interrupted after step 3 of 10; the last good checkpoint is {run.checkpoint(3)}; "
        f"go on with `fusionai train --broker TOKEN --resume '{run.folder}'`"
    )
    assert (run.saved, run.stopping) == (["step-000003"], 1)
    run.assert_exact(3)


def test_a_stop_after_a_checkpoint_makes_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=3)
    run.on_step = lambda done: run.ask_after(0.0) if done == 3 else None
    with pytest.raises(JobStopped, match="after step 3 of 10"):
        run.result()
    assert run.saved == ["step-000003"]


def test_a_stop_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=3)
    run.on_step = lambda done: run.ask_after(STEP_S / 2) if done == 2 else None
    assert run.result().steps == 3
    run.assert_exact(3)


def test_a_stop_before_the_first_step_is_done_makes_no_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.on_batch = lambda step: run.ask_after(STEP_S / 2) if step == 0 else None
    with pytest.raises(asyncio.CancelledError):
        run.result()
    assert run.kept() == []


def test_a_stop_on_a_pool_that_is_stuck_ends_all_the_same(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=1)

    def stuck(done: int) -> None:
        if done == 2:
            run.slow["b"] = 10 * STEP_S
            run.ask_after(STEP_S / 2)

    run.on_step = stuck
    with pytest.raises(asyncio.CancelledError):
        run.result()
    assert run.stop is not None
    assert run.stop.moment == f"during a step, which did not end within {3 * STEP_S:.0f} s"
    assert 3 * STEP_S > LEAST_PATIENCE_S
    assert run.kept() == ["step-000001", "step-000002"]


# --- an error ends it -------------------------------------------------------------------------------------------------


def test_data_that_fails_costs_no_step(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def fail(step: int) -> None:
        if step == 4:
            raise DataError("the file is gone")

    run.on_batch = fail
    with pytest.raises(DataError) as caught:
        run.result()
    assert str(caught.value) == (
        f"the file is gone (step 5 of 10; the last good checkpoint is {run.checkpoint(4)}; "
        f"go on with `fusionai train --broker TOKEN --resume {run.folder}`)"
    )
    assert run.kept() == ["step-000004"]
    run.assert_exact(4)


@pytest.mark.parametrize("place", ["on_batch", "on_step"])
def test_an_error_of_the_program_itself_stays_what_it_is(tmp_path: Path, place: str) -> None:
    run = Run(tmp_path)

    def fail(step: int) -> None:
        if step == 4:
            raise ZeroDivisionError("of the user")

    setattr(run, place, fail)
    with pytest.raises(ZeroDivisionError, match="of the user") as caught:
        run.result()
    assert str(caught.value) == "of the user"
    assert any(str(run.checkpoint(4)) in note for note in caught.value.__notes__)
    run.assert_exact(4)


def test_a_loss_that_is_no_number_leaves_the_step_before(tmp_path: Path) -> None:
    """No older checkpoint goes for it: the state before such a loss may be a bad one."""
    run = Run(tmp_path, checkpoint_every=2, keep_checkpoints=1)
    run.spoilt = 5
    with pytest.raises(
        JobError, match=r"the loss is nan at step 6.*step 6 of 10; the last good checkpoint is .*000005"
    ):
        run.result()
    assert run.kept() == ["step-000004", "step-000005"]
    run.assert_exact(4)
    run.assert_exact(5)


def test_after_the_loss_of_a_machine_nothing_is_tried(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=2)
    dies = Point("b", "sends boundary", round=3)
    with pytest.raises(
        JobError, match=rf"b .*step 4 of 10; the last good checkpoint is {run.checkpoint(2)}; go on with"
    ):
        run.result(within=lambda pool: pool.faults.at(dies, lambda other: pool.network.kill("b")))
    assert run.kept() == ["step-000002"]


def test_nothing_is_written_to_a_disk_that_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RunFolder, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise StorageError("the disk is full")

    monkeypatch.setattr(RunFolder, "append_metrics", refuse)
    run = Run(tmp_path)
    with pytest.raises(StorageError, match=r"the disk is full \(step 4 of 10; no checkpoint has been made yet\)"):
        run.result()
    assert run.kept() == []
