"""The pool file: machines and regions of a pool to plan for, in TOML. docs/pool-file.md has every field.

[owner]
gpu = "RTX 3060"
up_mbps = 40
down_mbps = 100

[[machines]]
gpu = "RTX 3080"
count = 50
up_mbps = 40
down_mbps = 250
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fusionai.errors import ConfigError
from fusionai.owner.pool_file_mistakes import explained, shown
from fusionai.scheduling.profile import DeviceProfile, Member
from fusionai.simulation.hardware.catalogue import DeviceKind, Hardware, lookup
from fusionai.simulation.hardware.efficiency import DEVICE_OF_KIND, profile_of
from fusionai.simulation.hardware.what_if_pool import WhatIfPool
from fusionai.units.byte_counts import parse_memory

MOST_MACHINES = 100_000
"""In one file, all tables together."""

_ONLY_REGION = "everywhere"
"""Region of all machines in a file that declares none."""

_MOST_REGIONS = 256
_LONGEST_RTT_MS = 60_000.0
_MBPS = (1e-3, 1e7)
"""Least and most of a speed in Mbit/s: a byte a second, and ten times what one fibre carries."""
_OVERHEAD_US = 10.0
_REQUIRED_FIGURES = ("matmul_tflops", "memory_gb", "memory_gb_per_s")
_OWN_FIGURES = (*_REQUIRED_FIGURES, "matmul_bf16_tflops", "overhead_us", "kind")
"""Fields that describe a device which is not the catalogue's."""


class _Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What any machine has; defaults are docs/pool-file.md's."""

    up_mbps: float
    down_mbps: float
    gpu: str | None = None
    matmul_tflops: float | None = None
    matmul_bf16_tflops: float | None = None
    memory_gb: float | None = None
    memory_gb_per_s: float | None = None
    overhead_us: float | None = None
    kind: DeviceKind | None = None
    memory: str | None = None
    region: str | None = None
    dialable: bool = True


class _Machines(_Machine, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str | None = None
    count: int = 1


class _Owner(_Machine, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = "owner"


class _Region(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    rtt_ms: float | None = None


class _Links(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rtt_ms: float = 20.0
    across_rtt_ms: float = 100.0


class _Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    between: tuple[str, str]
    rtt_ms: float | None = None
    mbps: float | None = None


class PoolFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole pool file as it is written; `pool_from` says what it means."""

    machines: tuple[_Machines, ...]
    owner: _Owner | None = None
    regions: tuple[_Region, ...] = ()
    links: _Links = _Links()
    routes: tuple[_Route, ...] = ()


def read_pool(path: Path, *, profile: Callable[[Hardware], DeviceProfile] = profile_of) -> WhatIfPool:
    """Read a pool file from disk; `profile` turns an entry of the catalogue into a device.

    Raises:
        ConfigError: it is not there or not valid; the text names the file, the field, its value and what is right.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"the pool file {path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a zero byte
        raise ConfigError(f"the pool file {path} cannot be read: {error}") from error
    return parse_pool(text, source=str(path), profile=profile)


def parse_pool(
    text: str, *, source: str = "the pool file", profile: Callable[[Hardware], DeviceProfile] = profile_of
) -> WhatIfPool:
    """Return the pool that a pool file describes. Raises ConfigError as `read_pool`."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits is a ValueError, arrays nested a thousand deep are the other.
        raise ConfigError(f"{source} is not valid TOML: {error}") from error
    return pool_from(table, source=source, profile=profile)


def pool_from(
    table: dict[str, Any], *, source: str, profile: Callable[[Hardware], DeviceProfile] = profile_of
) -> WhatIfPool:
    """Return the pool that the tables of a pool file describe. Raises ConfigError as `read_pool`."""
    try:
        file = msgspec.convert(table, PoolFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {explained(str(error), table, PoolFile)}") from error
    try:
        return _pool(file, profile)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _pool(file: PoolFile, profile: Callable[[Hardware], DeviceProfile]) -> WhatIfPool:
    regions = _regions(file)
    rtt_s, cap_bytes_per_s = _region_links(file, regions)
    groups = [(f"machines[{index}]", each) for index, each in enumerate(file.machines)]
    tables: list[tuple[str, _Machine, list[str]]] = [
        (field, each, names) for (field, each), names in zip(groups, _names(groups), strict=True)
    ]
    if file.owner is not None:
        tables.append(("owner", file.owner, [_checked_name("owner.name", file.owner.name)]))
    _check_unique(tables)

    machines: list[Member] = []
    hardware: list[Hardware | None] = []
    up_bytes_per_s: list[float] = []
    down_bytes_per_s: list[float] = []
    region: list[int] = []
    for field, each, names in tables:
        entry, device = _device(field, each, profile)
        machines += [Member(peer=name, name=name, device=device, dialable=each.dialable) for name in names]
        count = len(names)
        hardware += [entry] * count
        up_bytes_per_s += [_mbps(f"{field}.up_mbps", each.up_mbps)] * count
        down_bytes_per_s += [_mbps(f"{field}.down_mbps", each.down_mbps)] * count
        region += [_region_index(f"{field}.region", each.region, regions)] * count
    owner = machines.pop() if file.owner is not None else None
    return WhatIfPool(
        members=tuple(machines),
        owner=owner,
        hardware=tuple(hardware),
        up_bytes_per_s=np.array(up_bytes_per_s),
        down_bytes_per_s=np.array(down_bytes_per_s),
        regions=regions,
        region=np.array(region, dtype=np.int64),
        rtt_s=rtt_s,
        cap_bytes_per_s=cap_bytes_per_s,
    )


# --- names ----------------------------------------------------------------------------------------------------------


def _names(groups: list[tuple[str, _Machines]]) -> Iterator[list[str]]:
    """Yield the names of each table's machines. Nothing is built before all counts have been checked."""
    if not groups:
        raise ConfigError("machines is empty; add a [[machines]] table")
    for field, each in groups:
        if not 1 <= each.count <= MOST_MACHINES:
            raise ConfigError(f"{field}.count must be between 1 and {MOST_MACHINES}, got {shown(each.count)}")
    total = sum(each.count for _, each in groups)
    if total > MOST_MACHINES:
        raise ConfigError(f"machines has {total} machines in all; plan for at most {MOST_MACHINES} at once")
    for index, (field, each) in enumerate(groups):
        prefix = f"m{index + 1}" if each.name is None else _checked_name(f"{field}.name", each.name)
        yield [prefix] if each.count == 1 else [f"{prefix}-{number + 1}" for number in range(each.count)]


def _checked_name(field: str, name: str) -> str:
    # What a job file allows. Above all no ">": it stands between the peers of a link.
    if not 1 <= len(name) <= 80 or not all(c.isalnum() or c in "-_. " for c in name):
        raise ConfigError(f"{field} must be 1-80 letters, digits, spaces or any of -_. and is {shown(name)}")
    return name


def _check_unique(tables: list[tuple[str, _Machine, list[str]]]) -> None:
    taken: dict[str, str] = {}
    for field, _, names in tables:
        for name in names:
            if name in taken:
                raise ConfigError(
                    f"{field}.name gives a machine the name {name!r}, which {taken[name]} has; rename one"
                )
            taken[name] = field


# --- devices --------------------------------------------------------------------------------------------------------


def _device(
    field: str, machine: _Machine, profile: Callable[[Hardware], DeviceProfile]
) -> tuple[Hardware | None, DeviceProfile]:
    """Return a machine's entry in the catalogue, if it is of it, and its device."""
    given = [name for name in _OWN_FIGURES if getattr(machine, name) is not None]
    if machine.gpu is None:
        return None, _own_device(field, machine)
    if given:
        raise ConfigError(
            f"{field}.{given[0]} = {getattr(machine, given[0])} stands beside {field}.gpu = {shown(machine.gpu)}; "
            "give the catalogue's name or figures of your own, not both"
        )
    try:
        entry = lookup(machine.gpu)
    except ConfigError as error:
        raise ConfigError(f"{field}.gpu: {error}") from error
    device = profile(entry)
    if machine.memory is None:
        if entry.kind == "cpu":
            raise ConfigError(
                f'{field}.memory is missing, and {entry.name} has none of its own; say what is offered: memory = "16GB"'
            )
        return entry, device
    return entry, msgspec.structs.replace(
        device, memory_bytes=_memory(f"{field}.memory", machine.memory, entry.memory_bytes)
    )


def _own_device(field: str, machine: _Machine) -> DeviceProfile:
    """Return the device that a table's own figures describe: rates as reached, not peaks."""
    for name in _REQUIRED_FIGURES:
        if getattr(machine, name) is None:
            raise ConfigError(
                f'{field}.{name} is missing; give {field}.gpu = "RTX 3080" or another name of the catalogue, or all of '
                f"{', '.join(_REQUIRED_FIGURES)}"
            )
    assert machine.matmul_tflops is not None
    assert machine.memory_gb is not None
    assert machine.memory_gb_per_s is not None
    flops_per_s = {"matmul": _flops_per_s(f"{field}.matmul_tflops", machine.matmul_tflops)}
    if (bf16_tflops := machine.matmul_bf16_tflops) is not None:
        flops_per_s["matmul.bf16"] = _flops_per_s(f"{field}.matmul_bf16_tflops", bf16_tflops)
    overhead_us = _OVERHEAD_US if machine.overhead_us is None else machine.overhead_us
    memory_bytes = int(_within(f"{field}.memory_gb", machine.memory_gb, 1e-3, 1e6) * 1e9)
    if machine.memory is not None:
        memory_bytes = _memory(f"{field}.memory", machine.memory, memory_bytes)
    return DeviceProfile(
        name=f"a machine with {machine.matmul_tflops:g} TFLOP/s",
        device=DEVICE_OF_KIND[machine.kind or "consumer-gpu"],
        plane="torch",
        plane_version="unknown",
        memory_bytes=memory_bytes,
        threads=1,
        flops_per_s=flops_per_s,
        memory_bytes_per_s=_within(f"{field}.memory_gb_per_s", machine.memory_gb_per_s, 1e-3, 1e6) * 1e9,
        overhead_s=_within(f"{field}.overhead_us", overhead_us, 0.0, 1e6) * 1e-6,
    )


def _memory(field: str, text: str, most_bytes: int) -> int:
    try:
        offered = parse_memory(text[:100])
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    if offered > most_bytes:
        raise ConfigError(f"{field} = {text!r} is more than the device has ({most_bytes:,} bytes); offer less")
    return offered


# --- regions and numbers --------------------------------------------------------------------------------------------


def _regions(file: PoolFile) -> tuple[str, ...]:
    if len(file.regions) > _MOST_REGIONS:
        raise ConfigError(f"regions has {len(file.regions)} tables; declare at most {_MOST_REGIONS}")
    names: list[str] = []
    for index, region in enumerate(file.regions):
        name = _checked_name(f"regions[{index}].name", region.name)
        if name in names:
            raise ConfigError(f"regions[{index}].name = {name!r} is declared twice; remove one")
        names.append(name)
    return tuple(names) or (_ONLY_REGION,)


def _region_index(field: str, name: str | None, regions: tuple[str, ...]) -> int:
    if name is None:
        if len(regions) > 1:
            raise ConfigError(f"{field} is missing; it is one of {', '.join(regions)}")
        return 0
    if name not in regions:
        raise ConfigError(
            f"{field} = {shown(name)} is not declared (there is {_declared(regions)}); "
            "add a [[regions]] table with that name"
        )
    return regions.index(name)


def _declared(regions: Sequence[str]) -> str:
    return "no [[regions]] table" if list(regions) == [_ONLY_REGION] else ", ".join(regions)


def _region_links(file: PoolFile, regions: tuple[str, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the round trip in seconds and the cap in bytes/s, both by two regions."""
    count = len(regions)
    across_s = _rtt_s("links.across_rtt_ms", file.links.across_rtt_ms)
    rtt_s = np.full((count, count), across_s)
    np.fill_diagonal(rtt_s, _rtt_s("links.rtt_ms", file.links.rtt_ms))
    cap_bytes_per_s = np.full((count, count), np.inf)
    for index, region in enumerate(file.regions):
        if region.rtt_ms is not None:
            rtt_s[index, index] = _rtt_s(f"regions[{index}].rtt_ms", region.rtt_ms)
    seen: set[frozenset[int]] = set()
    for number, route in enumerate(file.routes):
        field = f"routes[{number}]"
        one, other = (_region_index(f"{field}.between[{end}]", name, regions) for end, name in enumerate(route.between))
        if one == other:
            raise ConfigError(f"{field}.between = {list(route.between)} is one region; set the rtt_ms of [[regions]]")
        if frozenset((one, other)) in seen:
            raise ConfigError(f"{field}.between = {list(route.between)} has a route already; remove one")
        seen.add(frozenset((one, other)))
        if route.rtt_ms is not None:
            rtt_s[one, other] = rtt_s[other, one] = _rtt_s(f"{field}.rtt_ms", route.rtt_ms)
        if route.mbps is not None:
            cap_bytes_per_s[one, other] = cap_bytes_per_s[other, one] = _mbps(f"{field}.mbps", route.mbps)
    return rtt_s, cap_bytes_per_s


def _within(field: str, value: float, least: float, most: float) -> float:
    # Not "value < least": nan is below nothing.
    if not least <= value <= most:
        raise ConfigError(f"{field} must be between {least:g} and {most:g}, got {value}")
    return value


def _flops_per_s(field: str, tflops: float) -> float:
    return _within(field, tflops, 1e-6, 1e6) * 1e12


def _mbps(field: str, value: float) -> float:
    """Return bytes/s of Mbit/s."""
    return _within(field, value, *_MBPS) * 1e6 / 8


def _rtt_s(field: str, value: float) -> float:
    return _within(field, value, 0.0, _LONGEST_RTT_MS) / 1e3
