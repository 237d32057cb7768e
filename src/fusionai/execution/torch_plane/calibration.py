"""What a device achieves, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from fusionai.execution.plane import Calibration
from fusionai.execution.torch_plane.attention import attention
from fusionai.execution.torch_plane.devices import apply_threads, synchronise, torch_device

_SMALL_OPERATORS = 200
"""So many make one measurement of the overhead, since one alone is shorter than a clock's reading."""
_FEWEST_SAMPLES = 3


def calibrate(name: str, seconds: float) -> Calibration:
    """Measure a device for about `seconds`, in fp32; forward passes only.

    FLOPs count a multiplication and an addition as two; attention counts all T x T scores, causal or not.
    Medians of several samples: on a busy machine single samples differ by a factor.
    """
    apply_threads()
    device = torch_device(name)
    large = device.type != "cpu"
    share_s = seconds / 5
    with torch.no_grad():
        flops_per_s = {
            "matmul": _matmul(device, 4096 if large else 512, share_s),
            "attention": _attention(device, 8 if large else 2, share_s),
            "convolution": _convolution(device, 64 if large else 4, share_s),
        }
        memory_bytes_per_s = _memory(device, 1 << (26 if large else 23), share_s)
    return Calibration(flops_per_s, memory_bytes_per_s, _overhead(device, share_s))


def _matmul(device: torch.device, rows: int, seconds: float) -> float:
    width = 1024
    rows_ND = torch.randn(rows, width, device=device)
    weight_DE = torch.randn(width, width, device=device)
    spent_s = _median_s(lambda: functional.linear(rows_ND, weight_DE), device, seconds)
    return 2 * rows * width * width / spent_s


def _attention(device: torch.device, batch: int, seconds: float) -> float:
    heads, tokens, size = 8, 256, 64
    query, key, value = torch.randn(3, batch, heads, tokens, size, device=device).unbind()
    spent_s = _median_s(lambda: attention(query, key, value, 0, size**-0.5, 0, 0.0, True), device, seconds)
    return 4 * batch * heads * tokens * tokens * size / spent_s


def _convolution(device: torch.device, batch: int, seconds: float) -> float:
    channels, side, kernel = 64, 32, 3
    image = torch.randn(batch, channels, side, side, device=device)
    weight = torch.randn(channels, channels, kernel, kernel, device=device)
    spent_s = _median_s(lambda: functional.conv2d(image, weight, padding=1), device, seconds)
    return 2 * batch * channels * channels * kernel * kernel * side * side / spent_s


def _memory(device: torch.device, elements: int, seconds: float) -> float:
    first, second, result = torch.ones(3, elements, device=device).unbind()
    spent_s = _median_s(lambda: torch.add(first, second, out=result), device, seconds)
    return 3 * first.nbytes / spent_s


def _overhead(device: torch.device, seconds: float) -> float:
    """Seconds of one operator that hardly computes, recorded for backward as in training."""
    small = torch.ones(4, device=device, requires_grad=True)
    add = torch.ops.aten.add.Tensor

    def run() -> None:
        for _ in range(_SMALL_OPERATORS):
            add(small, small)

    return _median_s(run, device, seconds) / _SMALL_OPERATORS


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
