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
"""So small that starting operators takes nearly all of its time."""

_SHAPES = (
    DecoderShape(layers=3, hidden=192, inner=512, heads=6, vocabulary=1024, batch=1, tokens=128),
    DecoderShape(layers=2, hidden=384, inner=1024, heads=12, vocabulary=1024, batch=1, tokens=128),
    DecoderShape(layers=1, hidden=768, inner=2048, heads=24, vocabulary=1024, batch=1, tokens=128),
    DecoderShape(layers=2, hidden=192, inner=512, heads=6, vocabulary=512, batch=2, tokens=32),
    DecoderShape(layers=3, hidden=128, inner=256, heads=4, vocabulary=256, batch=1, tokens=512),
    DecoderShape(layers=2, hidden=128, inner=256, heads=4, vocabulary=256, batch=1, tokens=1024),
)
"""Shapes for CPUs: from narrow to wide, and from short to long, where attention counts. With fewer shapes the rates fit
these shapes and not others: with three, predictions of other shapes were 14 % too long, with these six 2 %
(docs/benchmarks.md)."""

_ACCELERATOR_SHAPES = (
    DecoderShape(layers=2, hidden=1024, inner=2816, heads=16, vocabulary=8192, batch=2, tokens=512),
    DecoderShape(layers=2, hidden=2048, inner=5632, heads=16, vocabulary=8192, batch=4, tokens=1024),
    DecoderShape(layers=2, hidden=512, inner=1024, heads=8, vocabulary=1024, batch=2, tokens=4096),
)

_KINDS = ("matmul", "attention")
_NEVER = 1e15
"""Rate of a kind of work that took no measurable time."""

_LEAST_REST = 0.1
"""Least share of a pass that is left for products once bytes and operators are subtracted. It keeps an error in these
two rates from making the rate of products infinite."""

_CPU_PAUSE_S = 0.02
"""Pause between passes, because stages of a pipeline wait for each other. A CPU that has idled starts with cold caches,
which costs up to 1 ms a pass; without the pause, rates come out too high. Accelerators get no pause: what they would
lose is not known."""

_PASSES = 9
"""Times that AdamW's update and the norm go through a weight's bytes, as `scheduling.estimator` counts them."""


def measured(plane: Plane, device: str, *, seconds: float) -> Calibration:
    """Measure a device in about `seconds` by training steps of small decoders, in fp32 and bf16.

    A multiplication and an addition count as two FLOPs. Attention counts all T x T scores, causal or not. Each rate
    holds for forward and backward together. On a CPU, starting operators adds to the time of computing. On accelerators
    operators are queued ahead, so only the smallest stage shows how long starting one takes.
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
    """Return timings in bf16, or none where the device cannot compute in it."""
    try:
        return [time_stage(plane, device, shape, "bf16", seconds, pause_s) for shape in shapes]
    except (FusionError, RuntimeError) as error:
        log.info("%s does not compute in bf16: %s", device, error)
        return []


def _timings(stages: Sequence[StageSeconds], *, additive: bool) -> list[Timing]:
    """Return the timings of stages: FLOPs of matrix products and of attention, bytes, operators started, seconds."""
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
    """Return a timing without the seconds of its bytes and operators; at least `_LEAST_REST` of it remains."""
    *flops, moved, started = timing.amounts
    rest_s = timing.seconds - moved * byte_s - started * start_s
    return Timing((*flops, 0.0, 0.0), max(rest_s, _LEAST_REST * timing.seconds))


def _rate(unit_s: float) -> float:
    """Return units per second."""
    return 1 / max(unit_s, 1 / _NEVER)
