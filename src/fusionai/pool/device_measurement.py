"""What a machine offers: measured, and measured once a device and version."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil

from fusionai.errors import ConfigError
from fusionai.execution.plane import Calibration, Plane
from fusionai.scheduling.profile import DeviceProfile

log = logging.getLogger(__name__)

_CACHE = "calibration.json"
_METHOD = "decoders"
"""How devices are measured. A result that another way of measuring gave is not used."""

_MOST_CACHED = 64

_FREE_SHARE = 0.6
"""Share of the free memory that a compnode offers when its provider does not say: browsers and builds grow too."""
_DEVICE_SHARE = 0.85
"""The same for a GPU: its driver, its libraries and its fragmentation need the rest."""


def choose_device(plane: Plane, device: str | None) -> str:
    """Return the device asked for, or the best one.

    Raises:
        ConfigError: the plane has no such device.
    """
    found = plane.devices()
    if device is None:
        return found[0]
    if device not in found:
        raise ConfigError(f"device {device!r} is not usable here; usable: {', '.join(found)}")
    return device


def offered_memory(plane: Plane, device: str, memory_bytes: int | None) -> int:
    """Return the bytes that a machine gives to jobs: what its provider says, or a safe share of what is free.

    Raises:
        ConfigError: it was asked to offer more than the device has.
    """
    total = plane.device_memory_bytes(device)
    if memory_bytes is not None:
        if memory_bytes > total:
            raise ConfigError(f"--memory {memory_bytes:,} bytes is more than {device} has ({total:,}); offer less")
        return memory_bytes
    if device.startswith("cuda"):
        return int(total * _DEVICE_SHARE)
    return int(min(total, psutil.virtual_memory().available) * _FREE_SHARE)


def measure(
    plane: Plane,
    *,
    device: str | None = None,
    threads: int | None = None,
    memory_bytes: int | None = None,
    slowdown: float = 1.0,
    cache_folder: Path | None = None,
    remeasure: bool = False,
    seconds: float = 2.0,
) -> DeviceProfile:
    """Return the profile of a device; blocks for about `seconds` unless it was measured before.

    Args:
        plane: the execution plane to measure with. Its threads are set.
        device: one of the plane's; None for the best.
        threads: CPU threads to use; None for all cores.
        memory_bytes: what to offer; None for a safe share of what is free.
        slowdown: lab mode's factor by which passes are stretched; the profile tells the stretched speed.
        cache_folder: where results are kept; None for nowhere.
        remeasure: measure even if a result is there.
        seconds: duration of the measurement.

    Raises:
        ConfigError: no such device, or an argument is out of range.
    """
    cores = psutil.cpu_count() or 1
    if threads is not None and not 1 <= threads <= 1024:
        raise ConfigError(f"--threads must be between 1 and 1024, got {threads}")
    if slowdown < 1:
        raise ConfigError(f"--slowdown must be at least 1, got {slowdown}")
    count = threads or cores
    chosen = choose_device(plane, device)
    offered = offered_memory(plane, chosen, memory_bytes)
    plane.set_threads(count)
    plane_version = _version(plane.name)
    versions = f"{plane.name} {plane_version}|{_version('fusionai')}|{_METHOD}"
    key = f"{chosen}|{plane.describe(chosen)}|{count} threads|{versions}"
    known = {} if cache_folder is None else _read_cache(cache_folder / _CACHE)
    found = None if remeasure else known.get(key)
    if found is None:
        log.info("measuring %s with %d threads", chosen, count)
        found = plane.calibrate(chosen, seconds=seconds)
        if cache_folder is not None:
            _write_cache(cache_folder / _CACHE, {**known, key: found})
    return DeviceProfile(
        name=plane.describe(chosen)[:200],
        device=chosen,
        plane=plane.name,
        plane_version=plane_version,
        memory_bytes=offered,
        threads=count,
        flops_per_s={name: speed / slowdown for name, speed in found.flops_per_s.items()},
        memory_bytes_per_s=found.memory_bytes_per_s / slowdown,
        overhead_s=found.overhead_s * slowdown,
        update_bytes_per_s=found.update_bytes_per_s / slowdown,
        abilities=plane.abilities(chosen),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _read_cache(path: Path) -> dict[str, Calibration]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Calibration])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("the measurements in %s cannot be read (%s); measuring again", path, error)
        return {}


def _write_cache(path: Path, known: dict[str, Calibration]) -> None:
    newest = dict(list(known.items())[-_MOST_CACHED:])
    draft = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.encode(newest))
        draft.replace(path)
    except OSError as error:
        log.warning("the measurements cannot be kept in %s: %s", path, error)
