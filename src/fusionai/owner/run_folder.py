"""The run folder: the files of a training run.

RUN/job.toml          the job as run, every default written out
RUN/plan.json         which machine held which stages, and what the planner predicted
RUN/metrics.jsonl     one JSON object for each step, appended when the step ends
RUN/data/             the packed text
RUN/checkpoints/      step-000100, step-000200, ...
RUN/.lock             held by the owner that trains in this folder now
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from fusionai.errors import ConfigError, StorageError
from fusionai.scheduling.plan import Plan

JOB_FILE = "job.toml"
_METRICS = "metrics.jsonl"


class RunFolder:
    """One run's folder, made when it does not exist.

    This process holds it until `close`, or until it ends, however it ends. Nobody else can train in it meanwhile.
    """

    def __init__(self, path: Path) -> None:
        """Make and hold the folder.

        Raises:
            ConfigError: a file is in its way, or another owner trains in it.
            StorageError: it cannot be made.
        """
        self.path = path
        self._metrics = path / _METRICS
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"the run folder {path} cannot be made: a file is in its way") from error
        except OSError as error:
            raise StorageError(f"the run folder {path} cannot be made: {error}") from error
        self._lock = FileLock(path / ".lock", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another owner trains in the run folder {path} now: wait until it ends, or stop it (Ctrl-C), and then "
                "resume the run; or give --run another folder"
            ) from error
        except OSError as error:
            raise StorageError(f"the run folder {path} cannot be used: {error}") from error

    @classmethod
    def fresh(cls, parent: Path, name: str) -> RunFolder:
        """Make a new folder such as runs/tiny-llama-20260131-142501."""
        stem = f"{name.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, count = parent / stem, 1
        while True:
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
                return cls(path)
            except FileExistsError as error:
                if not parent.is_dir():
                    raise ConfigError(f"the folder {parent} for runs cannot be made: a file is in its way") from error
                count += 1
                path = parent / f"{stem}-{count}"
            except OSError as error:
                raise StorageError(f"the run folder {path} cannot be made: {error}") from error

    @classmethod
    def empty(cls, path: Path) -> RunFolder:
        """Make or take a folder for a new run. Raises ConfigError, as well, when it holds a run already."""
        _refuse_a_run(path)
        folder = cls(path)
        try:
            _refuse_a_run(path)  # another owner may have begun one meanwhile
        except ConfigError:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Let others train in the folder."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.path / "checkpoints"

    @property
    def text(self) -> Path:
        """The packed text."""
        return self.path / "data" / "text.npy"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:06d}"

    def write(self, name: str, text: str) -> None:
        """Write a small file, in one step where there is one already. Raises StorageError when the disk refuses."""
        path = self.path / name
        partial = path.with_name(f".{name}.partial")
        try:
            try:
                with partial.open("w", encoding="utf-8", newline="\n") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(_refusal(path, error)) from error

    def write_plan(self, plan: Plan) -> None:
        """Write the plan that the job runs by as plan.json. Raises StorageError when the disk refuses."""
        self.write("plan.json", msgspec.json.format(msgspec.json.encode(plan)).decode())

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises StorageError when the disk refuses."""
        try:
            with self._metrics.open("ab") as file:
                file.write(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            raise StorageError(_refusal(self._metrics, error)) from error


def open_run(run: Path | None, resume: Path | None, *, name: str) -> RunFolder:
    """Make and hold the folder of a run: `run`, by default that of the run to resume, or else a new one under "runs".

    Raises ConfigError when `run` holds another run already, or another owner trains in it, and StorageError.
    """
    if run is None and resume is None:
        return RunFolder.fresh(Path("runs"), name)
    if resume is not None and (run is None or run.resolve() == resume.resolve()):
        return RunFolder(resume)
    assert run is not None
    return RunFolder.empty(run)


def _refuse_a_run(path: Path) -> None:
    """Raise ConfigError when a folder holds a run, or a file that a run would replace."""
    found = [name for name in (JOB_FILE, _METRICS) if (path / name).exists()]
    checkpoints = sorted(each.name for each in path.glob("checkpoints/step-*"))
    if checkpoints:
        raise ConfigError(
            f"the run folder {path} holds a run already ({checkpoints[-1]}): go on with that run by --resume {path}, "
            "or give --run another folder"
        )
    if found:
        raise ConfigError(
            f"the run folder {path} holds a run already, or a file that a run would replace ({found[0]}), and no "
            "checkpoint: give --run another folder, or delete what is in this one"
        )


def _refusal(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"no space is left for {path}: free some, then resume the run; its last checkpoint is whole"
    return f"{path} cannot be written: {error}"
