"""A device's calibration from timed reference stages."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

from fusionai.errors import FusionError
from fusionai.execution.calibration.passes import StageSeconds, time_stage
from fusionai.execution.calibration.rates import Timing, solved
from fusionai.execution.calibration.reference_graph import DecoderShape
from fusionai.execution.plane import Calibration, Plane

log = logging.getLogger(__name__)

_TINY = DecoderShape(layers=4, hidden=32, inner=64, heads=2, vocabulary=64, batch=1, tokens=8)
"""Hardly computes: its time is the starting of operators."""

_SHAPES = (
    DecoderShape(layers=3, hidden=192, inner=512, heads=6, vocabulary=1024, batch=1, tokens=128),
    DecoderShape(layers=2, hidden=384, inner=1024, heads=12, vocabulary=1024, batch=1, tokens=128),
    DecoderShape(layers=1, hidden=768, inner=2048, heads=24, vocabulary=1024, batch=1, tokens=128),
    DecoderShape(layers=2, hidden=192, inner=512, heads=6, vocabulary=512, batch=2, tokens=32),
    DecoderShape(layers=3, hidden=128, inner=256, heads=4, vocabulary=256, batch=1, tokens=512),
    DecoderShape(layers=2, hidden=128, inner=256, heads=4, vocabulary=256, batch=1, tokens=1024),
)
"""For CPUs: narrow to wide, and short to long, where attention counts. Few shapes fit too well: with three of them the
passes of others came out 14 % too long, with these 2 % (docs/benchmarks.md)."""

_ACCELERATOR_SHAPES = (
    DecoderShape(layers=2, hidden=1024, inner=2816, heads=16, vocabulary=8192, batch=2, tokens=512),
    DecoderShape(layers=2, hidden=2048, inner=5632, heads=16, vocabulary=8192, batch=4, tokens=1024),
    DecoderShape(layers=2, hidden=512, inner=1024, heads=8, vocabulary=1024, batch=2, tokens=4096),
)

_KINDS = ("matmul", "attention")
_NEVER = 1e15
"""Rate of what took no measurable time."""

_LEAST_REST = 0.1

_CPU_PAUSE_S = 0.02
"""Between passes, as in a pipeline where stages wait for each other: a processor that has idled starts with cold
caches, which costs up to 1 ms. What an accelerator would lose is not known."""

_PASSES = 9
"""Through a weight's bytes that AdamW's update and its norm make, as `scheduling.estimator` counts them."""


def measured(plane: Plane, device: str, *, seconds: float) -> Calibration:
    """Measure a device in about `seconds` by training steps of small decoders, in fp32 and bf16.

    FLOPs count a multiplication and an addition as two; attention counts all T x T scores, causal or not. Each rate is
    that of forward and backward together. On a CPU starting operators adds to computing; on accelerators they are
    queued ahead, so there only the smallest stage tells what starting one takes.
    """
    additive = device == "cpu"
    shapes = _SHAPES if additive else _ACCELERATOR_SHAPES
    pause_s = _CPU_PAUSE_S if additive else 0.0
    share_s = seconds / (len(shapes) + 3)
    tiny = time_stage(plane, device, _TINY, "fp32", share_s, pause_s)
    full = [time_stage(plane, device, shape, "fp32", share_s, pause_s) for shape in shapes]
    half = _half(plane, device, (shapes[0], shapes[-1]), share_s, pause_s)
    operators = tiny.cost.operators + tiny.cost.backward_operators
    overhead_s = (tiny.forward_s + tiny.backward_s) / operators
    matmul_s, attention_s, byte_s, start_s = solved(_timings([tiny, *full] if additive else full, additive=additive))
    flops_per_s = {"matmul": _rate(matmul_s), "attention": _rate(attention_s)}
    if half:
        rest = [_without(each, byte_s, start_s if additive else 0.0) for each in _timings(half, additive=additive)]
        bf16_matmul_s, bf16_attention_s, _, _ = solved(rest)
        flops_per_s |= {"matmul.bf16": _rate(bf16_matmul_s), "attention.bf16": _rate(bf16_attention_s)}
    return Calibration(
        flops_per_s=flops_per_s,
        memory_bytes_per_s=_rate(byte_s),
        overhead_s=start_s if additive else overhead_s,
        update_bytes_per_s=statistics.median(_PASSES * each.cost.trainable_bytes / each.update_s for each in full),
    )


def _half(
    plane: Plane, device: str, shapes: Sequence[DecoderShape], seconds: float, pause_s: float
) -> list[StageSeconds]:
    """Return timings in bf16; none where the device does not know it."""
    try:
        return [time_stage(plane, device, shape, "bf16", seconds, pause_s) for shape in shapes]
    except (FusionError, RuntimeError) as error:
        log.info("%s does not compute in bf16: %s", device, error)
        return []


def _timings(stages: Sequence[StageSeconds], *, additive: bool) -> list[Timing]:
    """Return the passes of stages: FLOPs of matrix products and of attention, bytes, and operators started."""
    found = []
    for stage in stages:
        cost = stage.cost
        passes = (
            (cost.forward_flops, cost.forward_bytes, cost.operators, stage.forward_s),
            (cost.backward_flops, cost.backward_bytes, cost.backward_operators, stage.backward_s),
        )
        found += [
            Timing((*(flops.get(kind, 0) for kind in _KINDS), moved, started if additive else 0), spent_s)
            for flops, moved, started, spent_s in passes
        ]
    return found


def _without(timing: Timing, byte_s: float, start_s: float) -> Timing:
    """Return what remains of a pass without its bytes and the starting of its operators; never less than a tenth."""
    *flops, moved, started = timing.amounts
    rest_s = timing.seconds - moved * byte_s - started * start_s
    return Timing((*flops, 0.0, 0.0), max(rest_s, _LEAST_REST * timing.seconds))


def _rate(unit_s: float) -> float:
    """Return units per second."""
    return 1 / max(unit_s, 1 / _NEVER)
