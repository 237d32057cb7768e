"""Looking up, gathering, scattering, joining and padding: data moves, nothing is computed."""

from __future__ import annotations

from fusionai.graph.operators.schema import define

_SLICE = "start: int? = none, end: int? = none, step: int = 1"

OPERATORS = (
    *define(
        "aten.embedding.default(weight: tensor, indices: tensor, padding_idx: int = -1, "
        "scale_grad_by_freq: bool = false, sparse: bool = false)",
        "gather",
        saves=("indices",),
    ),
    *define("aten.index.Tensor(self: tensor, indices: tensors?)", "gather", saves=("indices",)),
    *define("aten.index_select.default(self: tensor, dim: int, index: tensor)", "gather", saves=("index",)),
    *define(
        "aten.gather.default(self: tensor, dim: int, index: tensor, *, sparse_grad: bool = false)",
        "gather",
        saves=("self", "index"),
    ),
    *define(
        "aten.take_along_dim.default(self: tensor, indices: tensor, dim: int? = none)",
        "gather",
        saves=("self", "indices"),
    ),
    *define(
        """
        aten.scatter.src(self: tensor, dim: int, index: tensor, src: tensor)
        aten.scatter.value(self: tensor, dim: int, index: tensor, value: number)
        aten.scatter_add.default(self: tensor, dim: int, index: tensor, src: tensor)
        aten.index_fill.int_Scalar(self: tensor, dim: int, index: tensor, value: number)
        """,
        "gather",
        saves=("index",),
    ),
    *define(
        """
        aten.index_copy.default(self: tensor, dim: int, index: tensor, source: tensor)
        aten.index_add.default(self: tensor, dim: int, index: tensor, source: tensor, *, alpha: number = 1)
        """,
        "gather",
        saves=("index", "source"),
    ),
    *define(
        "aten.scatter_reduce.two(self: tensor, dim: int, index: tensor, src: tensor, reduce: string, *, "
        "include_self: bool = true)",
        "gather",
        saves=("self", "index", "src", "output"),
    ),
    *define(
        "aten.index_put.default(self: tensor, indices: tensors?, values: operand, accumulate: bool = false)",
        "gather",
        saves=("indices",),
    ),
    *define(
        f"""
        aten.cat.default(tensors: tensors, dim: int = 0)
        aten.stack.default(tensors: tensors, dim: int = 0)
        aten.hstack.default(tensors: tensors)
        aten.vstack.default(tensors: tensors)
        aten.repeat.default(self: tensor, repeats: ints)
        aten.repeat_interleave.self_int(self: tensor, repeats: int, dim: int? = none, *, output_size: int? = none)
        aten.roll.default(self: tensor, shifts: ints, dims: ints = [])
        aten.flip.default(self: tensor, dims: ints)
        aten.constant_pad_nd.default(self: tensor, pad: ints, value: number = 0)
        aten.pad.default(self: tensor, pad: ints, mode: string = 'constant', value: float? = none)
        aten.slice_scatter.default(self: tensor, src: tensor, dim: int = 0, {_SLICE})
        aten.select_scatter.default(self: tensor, src: tensor, dim: int, index: int)
        aten.pixel_shuffle.default(self: tensor, upscale_factor: int)
        aten.pixel_unshuffle.default(self: tensor, downscale_factor: int)
        """,
        "gather",
    ),
    *define(
        """
        aten.one_hot.default(self: tensor, num_classes: int = -1)
        aten.bucketize.Tensor(self: tensor, boundaries: tensor, *, out_int32: bool = false, right: bool = false)
        """,
        "gather",
        differentiable=False,
    ),
    *define(
        "aten.searchsorted.Tensor(sorted_sequence: tensor, self: tensor, *, out_int32: bool = false, "
        "right: bool = false, side: string? = none, sorter: tensor? = none)",
        "gather",
        differentiable=False,
    ),
)
