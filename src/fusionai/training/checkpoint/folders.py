"""The checkpoints of a run: finds the newest one, and deletes old ones.

A checkpoint is a folder RUN/checkpoints/step-000123. A name with a leading dot is no complete checkpoint:

    .step-000123.partial     is being written
    .step-000123.replaced    is being replaced by a new one of the same step
    .step-000123.removed     is being deleted

A crash may leave any of them. The next run cleans up.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from pathlib import Path

from fusionai.errors import CheckpointError
from fusionai.training.checkpoint.manifest import read_manifest

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)")


def partial_of(folder: Path) -> Path:
    """Return where a checkpoint is written until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def replaced_of(folder: Path) -> Path:
    """Return where a checkpoint waits while a new one takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def restore(folder: Path) -> None:
    """Bring back a checkpoint whose replacement was cut off between its two renames."""
    replaced = replaced_of(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


def _steps(parent: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints' folders with their steps, the newest first."""
    try:
        entries = list(parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    for replaced in entries:
        if re.fullmatch(r"\.step-\d+\.replaced", replaced.name):
            # Reading must also work on a disk that cannot be written.
            with contextlib.suppress(OSError):
                restore(replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced")))
    found = ((_STEP.fullmatch(path.name), path) for path in parent.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _complete(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError as error:
        log.warning("a checkpoint is passed over: %s", error)
        return False
    return True


def newest_in(parent: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder of checkpoints."""
    return next((path for _, path in _steps(parent) if _complete(path)), None)


def latest(run_folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is complete: every file there at its size. None without one."""
    return newest_in(run_folder / "checkpoints")


def prune(run_folder: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` complete checkpoints of a run; return what was deleted.

    It also removes what a crash left. It must not run while a checkpoint of the run is being written. A file that
    cannot be deleted (on Windows, a file in use) stays until the next time.
    """
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, got keep={keep}")
    parent = run_folder / "checkpoints"
    steps = _steps(parent)
    kept = [step for step, path in steps if _complete(path)][:keep]
    removed = []
    for step, path in steps:
        if kept and step < kept[-1]:
            gone = path.with_name(f".{path.name}.removed")
            try:
                # Rename it first, in one step: a half deleted folder must not look like a checkpoint.
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
            except OSError as error:
                log.warning("the old checkpoint %s cannot be deleted: %s", path, error)
                continue
            removed.append(path)
    if parent.is_dir():
        for path in parent.iterdir():
            if re.fullmatch(r"\.step-\d+\.(partial|replaced|removed)", path.name):
                shutil.rmtree(path, ignore_errors=True)
    return removed
