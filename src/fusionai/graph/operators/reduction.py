"""Reductions, sorting, pooling and resampling."""

from __future__ import annotations

from fusionai.graph.operators.schema import ConcreteCall, define


def _pool_indices(call: ConcreteCall) -> int:
    """Return the bytes of the places of the maxima: one int64 for each output element."""
    return 8 * call.outputs[0].count


_POOL_2D = "self: tensor, kernel_size: ints, stride: ints = [], padding: ints = [0 0]"
_POOL_1D = "self: tensor, kernel_size: ints, stride: ints = [], padding: ints = [0]"

OPERATORS = (
    *define(
        """
        aten.mean.default(self: tensor, *, dtype: dtype? = none)
        aten.mean.dim(self: tensor, dim: ints?, keepdim: bool = false, *, dtype: dtype? = none)
        aten.sum.default(self: tensor, *, dtype: dtype? = none)
        aten.sum.dim_IntList(self: tensor, dim: ints?, keepdim: bool = false, *, dtype: dtype? = none)
        aten.cumsum.default(self: tensor, dim: int, *, dtype: dtype? = none)
        """,
        "reduction",
    ),
    *define(
        """
        aten.var.default(self: tensor, unbiased: bool = true)
        aten.var.dim(self: tensor, dim: ints?, unbiased: bool = true, keepdim: bool = false)
        aten.var.correction(self: tensor, dim: ints? = none, *, correction: number? = none, keepdim: bool = false)
        """,
        "reduction",
        saves=("self",),
    ),
    *define(
        """
        aten.prod.default(self: tensor, *, dtype: dtype? = none)
        aten.prod.dim_int(self: tensor, dim: int, keepdim: bool = false, *, dtype: dtype? = none)
        aten.std.correction(self: tensor, dim: ints? = none, *, correction: number? = none, keepdim: bool = false)
        aten.std.dim(self: tensor, dim: ints?, unbiased: bool = true, keepdim: bool = false)
        aten.amax.default(self: tensor, dim: ints = [], keepdim: bool = false)
        aten.amin.default(self: tensor, dim: ints = [], keepdim: bool = false)
        aten.max.default(self: tensor)
        aten.min.default(self: tensor)
        aten.logsumexp.default(self: tensor, dim: ints, keepdim: bool = false)
        aten.norm.Scalar(self: tensor, p: number = 2)
        aten.norm.ScalarOpt_dim(self: tensor, p: number?, dim: ints, keepdim: bool = false)
        aten.cumprod.default(self: tensor, dim: int, *, dtype: dtype? = none)
        """,
        "reduction",
        saves=("self", "output"),
    ),
    *define(
        "aten.linalg_vector_norm.default(self: tensor, ord: number = 2, dim: ints? = none, keepdim: bool = false, "
        "*, dtype: dtype? = none)",
        "reduction",
        saves=("self", "output"),
    ),
    *define(
        "aten.var_mean.dim(self: tensor, dim: ints?, unbiased: bool = true, keepdim: bool = false) -> 2",
        "reduction",
        saves=("self",),
    ),
    *define(
        "aten.var_mean.correction(self: tensor, dim: ints? = none, *, correction: number? = none, "
        "keepdim: bool = false) -> 2",
        "reduction",
        saves=("self",),
    ),
    *define(
        """
        aten.max.dim(self: tensor, dim: int, keepdim: bool = false) -> 2
        aten.min.dim(self: tensor, dim: int, keepdim: bool = false) -> 2
        aten.topk.default(self: tensor, k: int, dim: int = -1, largest: bool = true, sorted: bool = true) -> 2
        aten.sort.default(self: tensor, dim: int = -1, descending: bool = false) -> 2
        aten.sort.stable(self: tensor, *, stable: bool?, dim: int = -1, descending: bool = false) -> 2
        """,
        "reduction",
        saves=("output 1",),
    ),
    *define(
        """
        aten.argmax.default(self: tensor, dim: int? = none, keepdim: bool = false)
        aten.argmin.default(self: tensor, dim: int? = none, keepdim: bool = false)
        aten.argsort.default(self: tensor, dim: int = -1, descending: bool = false)
        aten.any.default(self: tensor)
        aten.any.dim(self: tensor, dim: int, keepdim: bool = false)
        aten.all.default(self: tensor)
        aten.all.dim(self: tensor, dim: int, keepdim: bool = false)
        aten.count_nonzero.default(self: tensor, dim: int? = none)
        aten.count_nonzero.dim_IntList(self: tensor, dim: ints)
        aten.histc.default(self: tensor, bins: int = 100, min: number = 0, max: number = 0)
        """,
        "reduction",
        differentiable=False,
    ),
    *define(
        f"""
        aten.max_pool1d.default({_POOL_1D}, dilation: ints = [1], ceil_mode: bool = false)
        aten.max_pool2d.default({_POOL_2D}, dilation: ints = [1 1], ceil_mode: bool = false)
        """,
        "reduction",
        saves=("self",),
        extra=_pool_indices,
    ),
    *define(
        f"""
        aten.avg_pool1d.default({_POOL_1D}, ceil_mode: bool = false, count_include_pad: bool = true)
        aten.adaptive_avg_pool1d.default(self: tensor, output_size: ints)
        aten.adaptive_avg_pool2d.default(self: tensor, output_size: ints)
        """,
        "reduction",
        saves=("self",),
    ),
    *define(
        f"aten.avg_pool2d.default({_POOL_2D}, ceil_mode: bool = false, count_include_pad: bool = true, "
        "divisor_override: int? = none)",
        "reduction",
        saves=("self",),
    ),
    *define(
        """
        aten.upsample_nearest2d.vec(input: tensor, output_size: ints?, scale_factors: floats?)
        aten.upsample_bilinear2d.vec(input: tensor, output_size: ints?, align_corners: bool, scale_factors: floats?)
        """,
        "reduction",
    ),
)
