"""Speeds of machines, disks and links as people read them."""

from __future__ import annotations


def bit_rate_text(bytes_per_s: float) -> str:
    """Return the bandwidth of a link, given in bytes per second, in megabits per second."""
    return f"{bytes_per_s * 8 / 1e6:,.0f} Mbit/s"


def byte_rate_text(bytes_per_s: float) -> str:
    """Return the speed of a disk in megabytes per second."""
    return f"{bytes_per_s / 1e6:,.0f} MB/s"


def flop_rate_text(flops_per_s: float) -> str:
    """Return a device's speed in billions of floating-point operations per second."""
    return f"{flops_per_s / 1e9:,.0f} GFLOP/s"
