"""What share of its peak a device reaches, and the profile that follows from it.

Nothing here was measured by this project: `ASSUMED` is what the comparisons start from until a machine of the kind has
been measured. GPUs for games and for datacentres are given the same shares on purpose, so that no comparison between
the two is decided by an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import msgspec

from fusionai.errors import ConfigError
from fusionai.scheduling.profile import DeviceProfile
from fusionai.simulation.hardware.catalogue import DeviceKind, Hardware, NumberFormat

DEVICE_OF_KIND: Mapping[DeviceKind, str] = MappingProxyType(
    {"consumer-gpu": "cuda:0", "datacentre-gpu": "cuda:0", "apple": "mps", "cpu": "cpu"}
)
"""The plane's name for the first device of a kind; AMD's GPUs have the same one as NVIDIA's."""


class Efficiency(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the peak that work reaches, and the cost of starting an operator.

    Raises ConfigError for a share outside (0, 1.2], or an overhead that is negative or endless. Shares above 1 exist:
    boards clock higher than their datasheets say.
    """

    matmul: float
    attention: float
    convolution: float
    memory: float
    """Share of the peak memory bandwidth, in operators that hardly compute."""
    overhead_s: float
    """Seconds that one small operator takes."""
    provenance: Literal["measured", "assumed"]
    note: str
    """What the figures rest on."""

    def __post_init__(self) -> None:
        for field in ("matmul", "attention", "convolution", "memory"):
            if not 0 < (share := getattr(self, field)) <= 1.2:
                raise ConfigError(f"efficiency.{field} must be above 0 and at most 1.2, got {share}; it is a share")
        if not 0 <= self.overhead_s < float("inf"):
            raise ConfigError(f"efficiency.overhead_s must be at least 0 seconds and finite, got {self.overhead_s}")


_GPU = Efficiency(
    # Published fp16 products of large square matrices reach 50 to 80 % of the dense peak (A100, RTX 3090 Ti); a layer's
    # are smaller.
    matmul=0.6,
    # Fused attention of moderate lengths and heads of 64: a little over half of what products reach.
    attention=0.35,
    # Implicit-GEMM kernels on the channel counts of common networks feed the units less evenly than plain products.
    convolution=0.4,
    # Streaming kernels come near the bus; rows that are short or strided do not.
    memory=0.8,
    # An operator of an eager framework costs the host about this much, whatever the GPU.
    overhead_s=10e-6,
    provenance="assumed",
    note="assumed for GPUs of games and datacentres alike: 60 % of peak in products, 80 % of the bandwidth",
)

ASSUMED: Mapping[DeviceKind, Efficiency] = MappingProxyType(
    {
        "consumer-gpu": _GPU,
        "datacentre-gpu": _GPU,
        "apple": Efficiency(
            # Published fp32 products under Metal reach about two thirds of the peak, at best.
            matmul=0.6,
            # Its attention kernels are younger than CUDA's.
            attention=0.25,
            convolution=0.3,
            # Display and processor share the memory.
            memory=0.75,
            # Each operator is encoded into a command buffer, which costs more than a launch.
            overhead_s=30e-6,
            provenance="assumed",
            note="assumed for Apple GPUs under Metal: 60 % of peak in products, 75 % of the bandwidth",
        ),
        "cpu": Efficiency(
            # Against the peak at base clock: wide vectors slow the clock and all cores share the caches.
            matmul=0.6,
            # Blocks for one core are small, and softmax is not a product.
            attention=0.3,
            convolution=0.3,
            # One socket's threads seldom saturate all channels.
            memory=0.6,
            # No launch, only the framework's bookkeeping and the start of its threads.
            overhead_s=5e-6,
            provenance="assumed",
            note="assumed for CPUs: 60 % of the peak at base clock in products, 60 % of the bandwidth",
        ),
    }
)
"""Figures by kind for hardware that nobody has measured here; the reasons stand beside them."""


def profile_of(
    hardware: Hardware,
    *,
    fp32_as: Literal["fp32", "tf32"] = "fp32",
    half_as: Literal["bf16", "fp16"] = "bf16",
    efficiency: Efficiency | None = None,
    memory_share: float = 0.9,
) -> DeviceProfile:
    """Return the profile that a device would be measured to have.

    Rates are under the names that the estimator reads: "matmul" for jobs in fp32, "matmul.bf16" for jobs in bf16,
    likewise attention and convolution. A format that the device has no unit for runs at the rate of fp32.

    Args:
        hardware: from the catalogue.
        fp32_as: "tf32" if products of fp32 tensors may round their inputs to tf32; frameworks do not by default.
        half_as: "fp16" takes the rate of fp16 for jobs in bf16. For comparisons with figures published for fp16, and
            for cards older than bf16 as if fp16 served them as well; they emulate bf16 at less than fp32's rate.
        efficiency: shares of the peak; None for `ASSUMED`. Its provenance is not part of the profile: keep it.
        memory_share: of the device's memory that is offered; driver, libraries and fragmentation take the rest.

    Raises:
        ConfigError: `memory_share` is not above 0 and at most 1.
    """
    if not 0 < memory_share <= 1:
        raise ConfigError(f"memory_share must be above 0 and at most 1, got {memory_share}")
    reached = efficiency or ASSUMED[hardware.kind]
    peaks = {"": _peak(hardware, fp32_as), ".bf16": _peak(hardware, half_as)}
    return DeviceProfile(
        name=hardware.name,
        device=DEVICE_OF_KIND[hardware.kind],
        plane="torch",
        plane_version="unknown",
        memory_bytes=int(hardware.memory_bytes * memory_share),
        threads=hardware.cores,
        flops_per_s={
            f"{op_class}{suffix}": share * peak
            for suffix, peak in peaks.items()
            for op_class, share in (
                ("matmul", reached.matmul),
                ("attention", reached.attention),
                ("convolution", reached.convolution),
            )
        },
        memory_bytes_per_s=reached.memory * hardware.memory_bytes_per_s,
        overhead_s=reached.overhead_s,
    )


def _peak(hardware: Hardware, number: NumberFormat) -> float:
    return hardware.flops_per_s.get(number, hardware.flops_per_s["fp32"])
