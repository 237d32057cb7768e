"""Operators that exist only while a model is traced; an OP-DAG knows them by the names in `GRAPH_NAMES`.

They have a shape but no computation: the execution planes compute what stands in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GRAPH_NAMES: Mapping[str, str] = {
    "fusion_trace.attention.default": "fusion.attention",
    "fusion_trace.grouped_mm.default": "aten._grouped_mm.default",
}
"""By operator of this module: its name in an OP-DAG."""


@torch.library.custom_op("fusion_trace::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
) -> Tensor:
    """Attention: query (B, H, T, D), key (B, G, T, D), value (B, G, T, E) to (B, H, T, E); G divides H."""
    raise NotImplementedError("fusion_trace.attention is traced, never run")


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op("fusion_trace::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows (S, K), sorted by group, times each group's matrix of (E, K, N); `ends` (E,) is int32: to (S, N).

    torch's own operator does the same, but its shape rule takes bfloat16 only.
    """
    raise NotImplementedError("fusion_trace.grouped_mm is traced, never run")


@grouped_mm.register_fake
def _(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], matrices.shape[2]))
