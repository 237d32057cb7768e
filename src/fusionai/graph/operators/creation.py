"""Tensors made from sizes and numbers alone. Nothing here returns uninitialised memory."""

from __future__ import annotations

from fusionai.graph.operators.schema import define

_OPTIONS = "*, dtype: dtype? = none, layout: layout? = none, device: device? = none, pin_memory: bool? = none"
_LIKE = f"{_OPTIONS}, memory_format: memory_format? = none"
_TRIANGLE = _OPTIONS.replace("dtype? = none", "dtype? = int64", 1)

OPERATORS = (
    *define(
        f"""
        aten.arange.default(end: number, {_OPTIONS})
        aten.arange.start(start: number, end: number, {_OPTIONS})
        aten.arange.start_step(start: number, end: number, step: number = 1, {_OPTIONS})
        aten.linspace.default(start: number, end: number, steps: int, {_OPTIONS})
        aten.zeros.default(size: ints, {_OPTIONS})
        aten.ones.default(size: ints, {_OPTIONS})
        aten.full.default(size: ints, fill_value: number, {_OPTIONS})
        aten.eye.default(n: int, {_OPTIONS})
        aten.scalar_tensor.default(s: number, {_OPTIONS})
        aten.tril_indices.default(row: int, col: int, offset: int = 0, {_TRIANGLE})
        aten.triu_indices.default(row: int, col: int, offset: int = 0, {_TRIANGLE})
        aten.zeros_like.default(self: tensor, {_LIKE})
        aten.ones_like.default(self: tensor, {_LIKE})
        aten.full_like.default(self: tensor, fill_value: number, {_LIKE})
        aten.new_zeros.default(self: tensor, size: ints, {_OPTIONS})
        aten.new_ones.default(self: tensor, size: ints, {_OPTIONS})
        aten.new_full.default(self: tensor, size: ints, fill_value: number, {_OPTIONS})
        """,
        "metadata",
        differentiable=False,
    ),
    *define(
        f"""
        aten.rand_like.default(self: tensor, {_LIKE})
        aten.randn_like.default(self: tensor, {_LIKE})
        """,
        "metadata",
        random=True,
        differentiable=False,
    ),
)
