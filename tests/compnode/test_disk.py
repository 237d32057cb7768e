"""The disk under the state folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fusionai.compnode import disk
from fusionai.compnode.disk import BURSTS_BYTES, measure_disk
from fusionai.scheduling.profile import DiskProfile


def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every sync."""
    calls: list[int] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", counted)
    return calls


def test_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "BURSTS_BYTES", (1 << 20, 4 << 20))
    calls = synced(monkeypatch)
    first = measure_disk(tmp_path / "state", keep_free_bytes=0)
    assert first.free_bytes > 0
    assert first.write_bytes_per_s is not None
    assert first.write_bytes_per_s > 1e5
    assert 1 <= len(calls) <= 2
    assert calls[-1] <= 4 << 20
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["disk.json"], "nothing is left of the probe"
    count = len(calls)
    again = measure_disk(tmp_path / "state", keep_free_bytes=0)
    assert (again.write_bytes_per_s, again.read_bytes_per_s) == (first.write_bytes_per_s, first.read_bytes_per_s)
    assert len(calls) == count
    measure_disk(tmp_path / "state", keep_free_bytes=0, remeasure=True)
    assert len(calls) > count
    count = len(calls)
    (tmp_path / "state" / "disk.json").write_text("{broken")
    measure_disk(tmp_path / "state", keep_free_bytes=0)
    assert len(calls) > count, "a broken cache is measured over"


def test_a_bound_on_what_is_written() -> None:
    assert sum(BURSTS_BYTES) <= 256 << 20


def test_a_slow_disk_gets_no_large_bursts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    calls = synced(monkeypatch)
    quick = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        quick(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    found = measure_disk(tmp_path, keep_free_bytes=0)
    assert calls == [1 << 20]
    assert found.write_bytes_per_s is not None
    assert found.write_bytes_per_s <= (1 << 20) / 0.2


def test_a_nearly_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = synced(monkeypatch)
    found = measure_disk(tmp_path, keep_free_bytes=1 << 60)
    assert found.free_bytes > 0
    assert (found.write_bytes_per_s, found.read_bytes_per_s) == (None, None)
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_costs_its_speeds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = measure_disk(tmp_path, keep_free_bytes=0)
    assert found.write_bytes_per_s is None
    assert list(tmp_path.iterdir()) == [], "neither the probe nor a wrong result is kept"
    (tmp_path / "file").write_text("")
    assert measure_disk(tmp_path / "file" / "state") == DiskProfile(0, None, None)
