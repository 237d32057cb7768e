"""The folder where a compnode keeps its identity and measurements. One running process a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from fusionai.errors import ConfigError, StorageError

_MOST_FOLDERS = 64


class StateFolder:
    """A folder held by this process until `close` (or its end, however it ends)."""

    def __init__(self, path: Path) -> None:
        """Make and hold the folder.

        Raises:
            ConfigError: another process holds it.
            StorageError: it cannot be made.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(
                f"the state folder {path} cannot be used: {error.strerror or error}; check its rights, or give "
                "another --state-dir"
            ) from error
        try:
            _lock(self._descriptor)
        except OSError as error:
            os.close(self._descriptor)
            raise ConfigError(
                f"the state folder {path} is in use by another compnode; give this one its own --state-dir"
            ) from error

    @classmethod
    def first_free(cls, parent: Path) -> StateFolder:
        """Hold the first folder of `parent` ("1", "2", ...) that no process holds.

        So several compnodes on one machine, say one a GPU, keep apart and find their identities again.
        """
        for number in range(1, _MOST_FOLDERS + 1):
            try:
                return cls(parent / str(number))
            except ConfigError:
                continue
        raise ConfigError(f"{_MOST_FOLDERS} compnodes run from {parent} already; give this one its own --state-dir")

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._descriptor)

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(descriptor: int) -> None:
    """Lock an open file for this process alone; raises OSError when another one has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        # mypy checks the branch of its own platform only.
        getattr(msvcrt, "locking")(descriptor, getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
