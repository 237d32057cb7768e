"""The run folder: the files of a training run.

RUN/job.toml          the job as run, every default written out
RUN/plan.json         which machine held which stages, and what the planner predicted
RUN/metrics.jsonl     one JSON object for each step, appended when the step ends
RUN/data/             the packed text
RUN/checkpoints/      step-000100, step-000200, ...
"""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import msgspec

from fusionai.errors import ConfigError, StorageError
from fusionai.scheduling.plan import Plan


class RunFolder:
    """One run's folder; made when it does not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = path / "metrics.jsonl"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"the run folder {path} cannot be made: a file is in its way") from error
        except OSError as error:
            raise StorageError(f"the run folder {path} cannot be made: {error}") from error

    @classmethod
    def fresh(cls, parent: Path, name: str) -> RunFolder:
        """Make a new folder such as runs/tiny-llama-20260131-142501."""
        stem = f"{name.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, count = parent / stem, 1
        while path.exists():
            count += 1
            path = parent / f"{stem}-{count}"
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:06d}"

    def write(self, name: str, text: str) -> None:
        """Write a small file. Raises StorageError when the disk refuses."""
        try:
            (self.path / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(_refusal(self.path / name, error)) from error

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


def _refusal(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"no space is left for {path}: free some, then resume the run; its last checkpoint is whole"
    return f"{path} cannot be written: {error}"
