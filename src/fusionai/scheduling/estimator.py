"""Seconds and bytes: what a share of an OP-DAG costs on a measured device, and a tensor on a measured link.

Compute is FLOPs over the achieved FLOP/s of their class, plus bytes moved by all other operators over the
achieved memory bandwidth, plus a fixed overhead for each operator. On a GPU operators are queued ahead, so there the
larger of the two parts counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusionai.errors import PlacementError
from fusionai.graph.cost import StageCost
from fusionai.scheduling.profile import DeviceProfile, LinkProfile

_FALLBACK_CLASS = "matmul"
"""Class whose rate stands for one that was not measured."""

_SLOWEST_CONVOLUTION = 0.5
"""Share of the matmul rate assumed for an unmeasured class: convolutions and attention reach less."""


def flops_rate(device: DeviceProfile, op_class: str, precision: str) -> float:
    """Return a device's achieved FLOP/s for an op class; "matmul.bf16" goes before "matmul".

    Raises PlacementError when the device has no usable measurement.
    """
    for name in (f"{op_class}.{precision}", op_class):
        if (rate := device.flops_per_s.get(name, 0.0)) > 0:
            return rate
    if op_class != _FALLBACK_CLASS:
        return _SLOWEST_CONVOLUTION * flops_rate(device, _FALLBACK_CLASS, precision)
    raise PlacementError(
        f"the profile of device {device.name!r} has no matmul FLOP/s (it has {sorted(device.flops_per_s)}); "
        "measure it again: fusionai join --remeasure"
    )


def pass_s(
    device: DeviceProfile, precision: str, *, flops: Mapping[str, int], moved_bytes: int, operators: int
) -> float:
    """Return the seconds of a pass: FLOPs by class, bytes of memory-bound operators, number of operators."""
    work_s = sum(amount / flops_rate(device, name, precision) for name, amount in flops.items() if amount)
    work_s += moved_bytes / device.memory_bytes_per_s
    overhead_s = operators * device.overhead_s
    return work_s + overhead_s if device.device == "cpu" else max(work_s, overhead_s)


def forward_s(cost: StageCost, device: DeviceProfile, precision: str) -> float:
    """Return the seconds of one microbatch's forward."""
    return pass_s(
        device,
        precision,
        flops=cost.forward_flops,
        moved_bytes=cost.forward_bytes,
        operators=cost.operators,
    )


def backward_s(cost: StageCost, device: DeviceProfile, precision: str) -> float:
    """Return the seconds of one microbatch's backward, gradients of weights included."""
    return pass_s(
        device,
        precision,
        flops=cost.backward_flops,
        moved_bytes=cost.backward_bytes,
        operators=cost.backward_operators,
    )


def deferred_s(cost: StageCost, device: DeviceProfile, precision: str) -> float:
    """Return the seconds of a microbatch's backward that follow the sending of its boundary gradients."""
    return cost.deferred_flops / flops_rate(device, _FALLBACK_CLASS, precision) if cost.deferred_flops else 0.0


def update_s(trained_bytes: float, device: DeviceProfile, optimizer_states: int) -> float:
    """Return the seconds of one optimizer update of so many bytes of weights, the gradients' norm included.

    It reads and writes each weight and state, reads each gradient twice (norm and update), and clears it.
    """
    return update_passes(optimizer_states) * trained_bytes / update_bytes_per_s(device)


def update_passes(optimizer_states: int) -> int:
    """Return how many times an update goes through the bytes of a weight, as `update_s` counts."""
    return 2 + 2 * optimizer_states + 3


def update_bytes_per_s(device: DeviceProfile) -> float:
    """Return the bandwidth at which a device updates weights: as measured, else that of its operators."""
    return device.update_bytes_per_s or device.memory_bytes_per_s


def heap_microbatches(device: DeviceProfile) -> int:
    """Return how many microbatches' activations a device's allocator holds beyond those alive.

    A C heap cannot give the holes of one microbatch's tensors to the next one's while smaller ones lie between them.
    With glibc 2.36 the peak was above the living bytes by the activations of 0.3 to 2.3 microbatches, median 1.2, over
    six widths, batches and lengths (docs/benchmarks.md, memory): the more, the smaller they were. The allocators of
    GPUs are taken to lose nothing; that is assumed, not measured.
    """
    return 1 if device.device == "cpu" else 0


def training_memory_bytes(cost: StageCost, device: DeviceProfile, in_flight: int, optimizer_states: int) -> int:
    """Return the memory that training a stage takes on a device, the framework's own apart."""
    return cost.training_bytes(in_flight + heap_microbatches(device), optimizer_states)


def send_s(size_bytes: float, link: LinkProfile) -> float:
    """Return the seconds for which sending occupies a link, latency apart."""
    return size_bytes / link.bandwidth_bytes_per_s


def delay_s(link: LinkProfile) -> float:
    """Return the one-way latency of a link."""
    return link.rtt_s / 2
