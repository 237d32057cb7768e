"""Operators that give another view of the same memory, or a copy where the layout or dtype demands one."""

from __future__ import annotations

from fusionai.graph.operators.schema import define

_CAST = "device: device? = none, pin_memory: bool? = none"
_COPY = "non_blocking: bool = false, copy: bool = false"
_TAIL = "memory_format: memory_format? = none"

OPERATORS = (
    *define(
        """
        aten.view.default(self: tensor, size: ints)
        aten.view_as.default(self: tensor, other: tensor)
        aten.transpose.int(self: tensor, dim0: int, dim1: int)
        aten.swapaxes.default(self: tensor, axis0: int, axis1: int)
        aten.swapdims.default(self: tensor, dim0: int, dim1: int)
        aten.permute.default(self: tensor, dims: ints)
        aten.movedim.int(self: tensor, source: int, destination: int)
        aten.movedim.intlist(self: tensor, source: ints, destination: ints)
        aten.t.default(self: tensor)
        aten.numpy_T.default(self: tensor)
        aten.mT.default(self: tensor)
        aten.adjoint.default(self: tensor)
        aten.unflatten.int(self: tensor, dim: int, sizes: ints)
        aten.unsqueeze.default(self: tensor, dim: int)
        aten.squeeze.default(self: tensor)
        aten.squeeze.dim(self: tensor, dim: int)
        aten.squeeze.dims(self: tensor, dim: ints)
        aten.expand.default(self: tensor, size: ints, *, implicit: bool = false)
        aten.expand_as.default(self: tensor, other: tensor)
        aten.broadcast_to.default(self: tensor, size: ints)
        aten.slice.Tensor(self: tensor, dim: int = 0, start: int? = none, end: int? = none, step: int = 1)
        aten.select.int(self: tensor, dim: int, index: int)
        aten.narrow.default(self: tensor, dim: int, start: int, length: int)
        aten.diagonal.default(self: tensor, offset: int = 0, dim1: int = 0, dim2: int = 1)
        aten.unfold.default(self: tensor, dimension: int, size: int, step: int)
        aten.split.Tensor(self: tensor, split_size: int, dim: int = 0) -> list
        aten.split.sizes(self: tensor, split_size: ints, dim: int = 0) -> list
        aten.split_with_sizes.default(self: tensor, split_sizes: ints, dim: int = 0) -> list
        aten.tensor_split.sections(self: tensor, sections: int, dim: int = 0) -> list
        aten.chunk.default(self: tensor, chunks: int, dim: int = 0) -> list
        aten.unbind.int(self: tensor, dim: int = 0) -> list
        aten.alias.default(self: tensor)
        aten.positive.default(self: tensor)
        """,
        "view",
        view="self",
    ),
    *define("aten.detach.default(self: tensor)", "view", view="self", differentiable=False),
    *define(
        f"""
        aten.reshape.default(self: tensor, shape: ints)
        aten.reshape_as.default(self: tensor, other: tensor)
        aten.flatten.using_ints(self: tensor, start_dim: int = 0, end_dim: int = -1)
        aten.contiguous.default(self: tensor, *, memory_format: memory_format = contiguous_format)
        aten.to.dtype(self: tensor, dtype: dtype, {_COPY}, {_TAIL})
        aten.to.dtype_layout(self: tensor, *, dtype: dtype? = none, layout: layout? = none, {_CAST}, {_COPY}, {_TAIL})
        aten.to.device(self: tensor, device: device, dtype: dtype, {_COPY}, {_TAIL})
        aten.to.other(self: tensor, other: tensor, {_COPY}, {_TAIL})
        aten.type_as.default(self: tensor, other: tensor)
        """,
        "elementwise",
        view="self",
    ),
    *define(
        f"aten._to_copy.default(self: tensor, *, dtype: dtype? = none, layout: layout? = none, {_CAST}, "
        f"non_blocking: bool = false, {_TAIL})",
        "elementwise",
    ),
)
