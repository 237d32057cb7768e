"""Measures the disk under a state folder: free bytes, and sequential speeds, which are measured once for each disk.

Bursts that grow fourfold are written, each followed by a sync, so that the system's cache is not taken for the disk. A
slow disk takes long for small bursts and never gets large ones. At most 213 MiB are written, in about half a second,
and deleted at once. Then the largest burst is read, after the system was asked to drop it from its cache. Where the
system cannot be asked (Windows), and on a nearly full disk, the speeds stay unknown.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from pathlib import Path

import msgspec

from fusionai.scheduling.profile import DiskProfile
from fusionai.units.byte_counts import bytes_text

log = logging.getLogger(__name__)

BURSTS_BYTES = tuple(each << 20 for each in (1, 4, 16, 64, 128))
KEEP_FREE_BYTES = 2 << 30
"""Nothing is written to a disk that would have less than this left."""

_CACHE = "disk.json"
_PROBE = "disk-probe.tmp"
_PIECE_BYTES = 1 << 20
_SECONDS = 0.5
"""For all bursts; and the same for reading. A very slow disk takes as long as it needs for the first MiB."""
_GROWTH = 4.0
_F_NOCACHE = 48
"""macOS: this file's reads and writes do not use the cache."""


class _Speeds(msgspec.Struct, frozen=True):
    disk: str
    """Which disk was measured: a folder may be moved to another one."""
    write_bytes_per_s: float | None
    read_bytes_per_s: float | None


def measure_disk(folder: Path, *, remeasure: bool = False, keep_free_bytes: int = KEEP_FREE_BYTES) -> DiskProfile:
    """Return the profile of the disk under `folder`; blocks for about a second unless it was measured before.

    Results are kept in the folder. A disk that cannot be measured costs its speeds, not the membership.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = free_disk_bytes(folder)
        if free_bytes is None:
            return DiskProfile(0, None, None)
        disk = f"{folder.stat().st_dev}, {shutil.disk_usage(folder).total} bytes"
    except OSError as error:
        log.warning("the disk of %s tells nothing of itself: %s", folder, error)
        return DiskProfile(0, None, None)
    known = None if remeasure else _read_cache(folder / _CACHE)
    if known is None or known.disk != disk:
        if free_bytes < keep_free_bytes + BURSTS_BYTES[-1]:
            log.info("the disk of %s is not measured: it has only %s free", folder, bytes_text(free_bytes))
            return DiskProfile(free_bytes, None, None)
        write, read = _measured(folder / _PROBE)
        known = _Speeds(disk, write, read)
        if write is not None:
            _write_cache(folder / _CACHE, known)
    return DiskProfile(free_bytes, known.write_bytes_per_s, known.read_bytes_per_s)


def free_disk_bytes(folder: Path) -> int | None:
    """Return the bytes that may still be written under a folder; None when the system does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _measured(path: Path) -> tuple[float | None, float | None]:
    """Return bytes per second written and read."""
    # Random, so that a disk or file system that compresses gains nothing.
    piece = os.urandom(_PIECE_BYTES)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o600)
        try:
            uncached = _bypass_cache(descriptor)
            write, size = _written(descriptor, piece)
            return write, _read(descriptor, size) if uncached else None
        finally:
            os.close(descriptor)
            path.unlink()
    except OSError as error:
        log.warning("the disk cannot be measured with %s: %s", path, error)
        return None, None


def _written(descriptor: int, piece: bytes) -> tuple[float, int]:
    """Return bytes per second of the largest burst that fitted the time, and its size; it is at the file's start."""
    began_s = time.perf_counter()
    for size in BURSTS_BYTES:
        start_s = time.perf_counter()
        os.lseek(descriptor, 0, os.SEEK_SET)
        for _ in range(size // _PIECE_BYTES):
            _write_all(descriptor, piece)
        os.fsync(descriptor)
        ended_s = time.perf_counter()
        if ended_s - began_s + _GROWTH * (ended_s - start_s) > _SECONDS:
            break
    return size / max(ended_s - start_s, 1e-6), size


def _write_all(descriptor: int, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read(descriptor: int, size: int) -> float:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    start_s, got = time.perf_counter(), 0
    while got < size and time.perf_counter() < start_s + _SECONDS:
        got += len(os.read(descriptor, _PIECE_BYTES))
    return got / max(time.perf_counter() - start_s, 1e-6)


def _bypass_cache(descriptor: int) -> bool:
    """Return whether what is read will come from the disk; arranges for it where that must be said first."""
    if hasattr(os, "posix_fadvise"):
        return True
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, _F_NOCACHE, 1)
        return True
    return False


def _read_cache(path: Path) -> _Speeds | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Speeds)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("the measurement in %s cannot be read (%s); measuring again", path, error)
        return None


def _write_cache(path: Path, speeds: _Speeds) -> None:
    draft = path.with_name(path.name + ".new")
    try:
        draft.write_bytes(msgspec.json.encode(speeds))
        draft.replace(path)
    except OSError as error:
        log.warning("the measurement cannot be kept in %s: %s", path, error)
