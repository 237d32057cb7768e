"""Bounds on what members say; msgspec has checked the types already."""

from __future__ import annotations

import math
import re

from fusionai.errors import ProtocolError
from fusionai.pool.messages import Heartbeat, JobProgress, RegisterMember, ReplanJob, SubmitJob
from fusionai.pool.names import check_name
from fusionai.scheduling.profile import DeviceProfile, DiskProfile, LinkProfile
from fusionai.units.addresses import split_address

_MOST_ADDRESSES = 8
_MOST_TEXT = 1000
_MOST_CONFIG = 256 << 10
_MOST_ENTRIES = 1024
_MOST_HELD = 16
"""Shares of one member: a compnode has two, an owner sixteen. A status lists them of all members, in one message."""
_MOST_MICROBATCHES = 65_536
_MOST_OPERATORS = 2048
"""Most operators that a plane may name; the vocabulary has some hundred."""
_MOST_SIZE = 1 << 40
_MOST_DISK_BYTES = 1 << 60
_MOST_DISK_BYTES_PER_S = 1e12
_MOST_BYTES_PER_S = 1e12
"""Most bytes per second of a link: no machine has ten network cards of 800 Gbit/s."""


def check_register(message: RegisterMember) -> None:
    """Raises ConfigError for a bad name, ProtocolError for anything else out of bounds."""
    check_name(message.name)
    _require(len(message.addresses) <= _MOST_ADDRESSES, f"at most {_MOST_ADDRESSES} addresses are allowed")
    for address in message.addresses:
        _require(len(address) <= 300, "an address is too long")
        split_address(address)
    if message.device is None:
        _require(message.role == "observer", f"a {message.role} must register with its device's profile")
    else:
        _check_device(message.device)
    if message.disk is not None:
        _check_disk(message.disk)


def _check_device(device: DeviceProfile) -> None:
    texts = (device.name, device.device, device.plane, device.plane_version)
    _require(all(len(text) <= 200 for text in texts), "a text in the device's profile is too long")
    _require(len(device.flops_per_s) <= 32, "too many op classes in the device's profile")
    _require(all(len(name) <= 50 for name in device.flops_per_s), "an op class's name is too long")
    figures = (device.memory_bytes_per_s, *device.flops_per_s.values())
    _require(all(_positive(each) for each in figures), "a speed in the device's profile is not above 0")
    _require(0 <= device.update_bytes_per_s < float("inf"), "the device's speed of updates is out of range")
    _require(0 <= device.overhead_s < 60, "the device's overhead is not between 0 and 60 s")
    _require(0 <= device.memory_bytes < _MOST_SIZE << 10, "the device's memory is out of range")
    _require(1 <= device.threads <= 65_536, "the device's number of threads is out of range")
    if (abilities := device.abilities) is not None:
        _require(len(abilities.operators) <= _MOST_OPERATORS, "the plane names too many operators")
        _require(len(abilities.dtypes) <= 64, "the plane names too many element types")
        _require(all(len(name) <= 200 for name in (abilities.plane, *abilities.operators)), "an operator is too long")


def _check_disk(disk: DiskProfile) -> None:
    _require(0 <= disk.free_bytes < _MOST_DISK_BYTES, "the disk's free space is out of range")
    for speed in (disk.write_bytes_per_s, disk.read_bytes_per_s):
        _require(speed is None or 0 < speed < _MOST_DISK_BYTES_PER_S, "a disk's speed is out of range")


def check_link(profile: LinkProfile) -> None:
    """Raises ProtocolError unless a measured link is plausible."""
    _require(0 < profile.bandwidth_bytes_per_s < _MOST_BYTES_PER_S, "a measured bandwidth is out of range")
    _require(0 <= profile.rtt_s < 3600, "a measured round trip is out of range")


def check_heartbeat(message: Heartbeat) -> None:
    """Raises ProtocolError."""
    _require(0 <= message.busy < 1e6 and 0 <= message.memory_bytes < _MOST_SIZE << 10, "a figure is out of range")
    free = message.disk_free_bytes
    _require(free is None or 0 <= free < _MOST_DISK_BYTES, "the disk's free space is out of range")
    _require(len(message.holds) <= _MOST_HELD, "a heartbeat names too many jobs")
    _require(
        all(len(each.job) <= 64 and len(each.line) <= _MOST_TEXT for each in message.holds),
        "a heartbeat's text is too long",
    )
    _require(len(message.bytes_sent) <= _MOST_ENTRIES, "a heartbeat names too many peers")
    _require(all(len(peer) == 64 and count >= 0 for peer, count in message.bytes_sent.items()), "a count is wrong")


def check_progress(message: JobProgress) -> None:
    """Raises ProtocolError."""
    _require(0 <= message.step <= message.steps, "a step is not within its job's")
    _require(math.isfinite(message.tokens_per_s) and message.tokens_per_s >= 0, "a throughput is not a figure above 0")


def check_submit(message: SubmitJob) -> None:
    """Raises ProtocolError."""
    _require(1 <= len(message.job_name) <= 200, "a job's name has 1 to 200 characters")
    _require(len(message.config) <= _MOST_CONFIG, f"a job's configuration has at most {_MOST_CONFIG:,} characters")
    _require(re.fullmatch("[0-9a-f]{64}", message.graph_hash) is not None, "a content hash has 64 hexadecimal digits")
    _require(0 <= message.front <= message.back, "front and back are out of order")
    _require(1 <= message.microbatches <= _MOST_MICROBATCHES, f"a step has 1 to {_MOST_MICROBATCHES:,} microbatches")
    _require(0 <= message.compnodes <= 10_000, "a job uses at most 10,000 compnodes")
    _require(len(message.machines) <= 10_000, "a job names at most 10,000 compnodes")
    _require(all(len(name) <= _MOST_TEXT for name in message.machines), "the name of a compnode is too long")
    _require(len(message.sizes) <= 64, "a graph has at most 64 symbols")
    _require(
        all(len(name) <= 100 and 0 < size < _MOST_SIZE for name, size in message.sizes.items()),
        "a size is out of range",
    )
    _require(message.cuts is None or len(message.cuts) <= 10_000, "too many cuts")


def check_replan(message: ReplanJob) -> None:
    """Raises ProtocolError."""
    _require(len(message.factors) <= _MOST_ENTRIES, "a request for a new plan names too many machines")
    _require(
        all(len(peer) == 64 and _positive(factor) for peer, factor in message.factors.items()),
        "a machine's factor is not above 0",
    )
    _require(0 <= message.steps_left < _MOST_SIZE, "the number of steps left is out of range")
    _require(0 <= message.front <= message.back, "front and back are out of order")
    _require(0 <= message.compnodes <= 10_000, "a job uses at most 10,000 compnodes")
    _require(len(message.machines) <= 10_000, "a job uses at most 10,000 compnodes")


def _positive(figure: float) -> bool:
    return math.isfinite(figure) and figure > 0


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ProtocolError(f"the broker refuses this: {problem}")
