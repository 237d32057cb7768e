"""Measures a device's speed in convolutions, because the reference decoder has none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from fusionai.execution.torch_plane.devices import apply_threads, synchronise, torch_device

_FEWEST_SAMPLES = 3


def convolution_flops_per_s(name: str, seconds: float) -> float:
    """Measure forward passes of a convolution on a device for about `seconds`, in fp32; 2 FLOPs a multiplication."""
    apply_threads()
    device = torch_device(name)
    with torch.no_grad():
        return _convolution(device, 64 if device.type != "cpu" else 4, seconds)


def _convolution(device: torch.device, batch: int, seconds: float) -> float:
    channels, side, kernel = 64, 32, 3
    image = torch.randn(batch, channels, side, side, device=device)
    weight = torch.randn(channels, channels, kernel, kernel, device=device)
    spent_s = _median_s(lambda: functional.conv2d(image, weight, padding=1), device, seconds)
    return 2 * batch * channels * channels * kernel * kernel * side * side / spent_s


def _median_s(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median seconds of a call, after a warm-up, from as many calls as `seconds` allow."""
    work()
    synchronise(device)
    samples: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(samples) < _FEWEST_SAMPLES or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        work()
        synchronise(device)
        samples.append(time.perf_counter() - start_s)
    return max(statistics.median(samples), 1e-9)
