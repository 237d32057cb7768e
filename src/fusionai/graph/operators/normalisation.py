"""Normalisations, softmax and dropout."""

from __future__ import annotations

import math

from fusionai.graph.operators.schema import ConcreteCall, define


def _layer_statistics(call: ConcreteCall) -> int:
    """Return the bytes of each row's mean and reciprocal deviation, at least in single precision."""
    source = call.tensor("input")
    rows = source.count // max(1, math.prod(call.integers("normalized_shape")))
    return 2 * rows * max(4, source.nbytes // max(1, source.count))


def _rms_statistics(call: ConcreteCall) -> int:
    """Return the bytes of each row's mean square and its root, and of the normalised rows.

    CPUs have no fused kernel, so they keep the normalised rows for the weight's gradient.
    """
    rows = _layer_statistics(call)
    return rows + (call.tensor("input").nbytes if call.has("weight") else 0)


def _channel_statistics(call: ConcreteCall) -> int:
    source = call.tensor("input")
    channels = source.shape[1] if len(source.shape) > 1 else 1
    return 2 * 4 * channels if call.number("training") else 0


def _instance_statistics(call: ConcreteCall) -> int:
    return 2 * 4 * math.prod(call.tensor("input").shape[:2])


def _group_statistics(call: ConcreteCall) -> int:
    return 2 * 4 * call.tensor("input").shape[0] * int(call.number("num_groups"))


def drops(call: ConcreteCall) -> bool:
    """Return whether a dropout call does anything. If it does not, torch returns the input itself."""
    return bool(call.number("train")) and call.number("p") > 0


def _noise(call: ConcreteCall) -> int:
    """Return the bytes of the scaled mask: as many as the input's on CPUs (GPUs keep one byte for each element)."""
    return call.tensor("input").nbytes if drops(call) else 0


def _feature_noise(call: ConcreteCall) -> int:
    source = call.tensor("input")
    per_feature = max(1, math.prod(source.shape[2:]))
    return source.nbytes // per_feature if drops(call) else 0


_BATCH_NORM = (
    "aten.batch_norm.default(input: tensor, weight: tensor?, bias: tensor?, running_mean: tensor?, "
    "running_var: tensor?, training: bool, momentum: float, eps: float, cudnn_enabled: bool)"
)
_INSTANCE_NORM = (
    "aten.instance_norm.default(input: tensor, weight: tensor?, bias: tensor?, running_mean: tensor?, "
    "running_var: tensor?, use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool)"
)
_LAYER_NORM = (
    "aten.layer_norm.default(input: tensor, normalized_shape: ints, weight: tensor? = none, "
    "bias: tensor? = none, eps: float = 1e-05, cudnn_enable: bool = true)"
)
_GROUP_NORM = (
    "aten.group_norm.default(input: tensor, num_groups: int, weight: tensor? = none, bias: tensor? = none, "
    "eps: float = 1e-05, cudnn_enabled: bool = true)"
)
_RMS_NORM = "aten.rms_norm.default(input: tensor, normalized_shape: ints, weight: tensor? = none, eps: float? = none)"

OPERATORS = (
    *define(_LAYER_NORM, "normalisation", saves=("input", "weight", "bias"), extra=_layer_statistics),
    *define(_RMS_NORM, "normalisation", saves=("input", "weight"), extra=_rms_statistics),
    *define(_GROUP_NORM, "normalisation", saves=("input", "weight"), extra=_group_statistics),
    *define(
        _BATCH_NORM,
        "normalisation",
        mutates=("running_mean", "running_var"),
        saves=("input", "weight", "running_mean", "running_var"),
        extra=_channel_statistics,
    ),
    *define(
        _INSTANCE_NORM,
        "normalisation",
        mutates=("running_mean", "running_var"),
        saves=("input", "weight"),
        extra=_instance_statistics,
    ),
    *define(
        """
        aten.softmax.int(self: tensor, dim: int, dtype: dtype? = none)
        aten.log_softmax.int(self: tensor, dim: int, dtype: dtype? = none)
        aten._softmax.default(self: tensor, dim: int, half_to_float: bool)
        aten._log_softmax.default(self: tensor, dim: int, half_to_float: bool)
        """,
        "normalisation",
        saves=("output",),
    ),
    *define(
        "aten.dropout.default(input: tensor, p: float, train: bool)",
        "elementwise",
        view="input",
        random=True,
        extra=_noise,
    ),
    *define(
        "aten.feature_dropout.default(input: tensor, p: float, train: bool)",
        "elementwise",
        view="input",
        random=True,
        extra=_feature_noise,
    ),
    *define(
        "aten.alpha_dropout.default(input: tensor, p: float, train: bool)",
        "elementwise",
        view="input",
        random=True,
        saves=("input",),
        extra=_noise,
    ),
)
