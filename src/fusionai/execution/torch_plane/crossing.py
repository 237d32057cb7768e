"""Checks the tensors that cross between stages: received values, and the gradients that start a stage's backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusionai.errors import GraphError
from fusionai.execution.torch_plane.build import Feed, StageFunction
from fusionai.execution.torch_plane.tensors import from_data
from fusionai.graph.model import SubDag, ValueName
from fusionai.tensor import TensorData

_AUTOCAST = frozenset({"float32", "bfloat16"})
"""When a job runs in bf16, either of these dtypes may cross where the other one is declared."""


def feeds(
    function: StageFunction,
    values: Mapping[ValueName, TensorData],
    device: torch.device,
    *,
    autocast: bool,
    name: str,
) -> dict[ValueName, Tensor]:
    """Check the tensors given against the stage's, and return them in its order, on the device.

    Args:
        autocast: whether float32 and bfloat16 may come for each other from another stage.
        name: stage and microbatch, for errors.

    Raises GraphError naming the value that is unknown, missing, or of another dtype or shape.
    """
    unknown = values.keys() - {feed.name for feed in function.feeds}
    if unknown:
        raise GraphError(f"{name} takes no value {min(unknown)!r}")
    result = {}
    for feed in function.feeds:
        if feed.name not in values:
            raise GraphError(f"{name} needs the value {feed.name!r}, which was not given")
        data = values[feed.name]
        if data.shape != feed.shape or not _accepts(feed, data.dtype, autocast):
            raise GraphError(
                f"{name}: value {feed.name!r} must be {feed.dtype} of shape {list(feed.shape)}, "
                f"but is {data.dtype} of shape {list(data.shape)}"
            )
        result[feed.name] = from_data(data, device)
    return result


def backward_starts(
    subdag: SubDag,
    roots: Mapping[ValueName, Tensor],
    gradients: Mapping[ValueName, Sequence[TensorData]],
    loss_weight: float,
    device: torch.device,
    *,
    name: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that backward starts from, with their gradients.

    Args:
        roots: outputs of the forward, by name.
        gradients: for each value sent, one gradient from each of its receivers.
        loss_weight: the gradient of the loss, where the stage computes the loss.
        name: stage and microbatch, for errors.

    Raises GraphError naming the value whose gradients have the wrong number or shape.
    """
    targets: dict[ValueName, int] = {}
    for transfer in subdag.sends:
        if transfer.gradient:
            targets[transfer.value] = targets.get(transfer.value, 0) + 1
    unknown = gradients.keys() - targets.keys()
    if unknown:
        raise GraphError(f"{name} sent no value {min(unknown)!r} that has a gradient")
    started, starts = [], []
    for value, count in targets.items():
        given = gradients.get(value, ())
        if len(given) != count:
            raise GraphError(f"{name} needs {count} gradients of {value!r}, got {len(given)}")
        root = roots[value]
        total: Tensor | None = None
        for data in given:
            part = _gradient(data, root, device, f"{name}: the gradient of {value!r}")
            total = part if total is None else total + part
        if root.requires_grad and total is not None:
            started.append(root)
            starts.append(total)
    if subdag.loss is not None:
        loss = roots[subdag.loss]
        if loss.requires_grad:
            started.append(loss)
            starts.append(torch.full_like(loss, loss_weight, requires_grad=False))
    return started, starts


def _accepts(feed: Feed, dtype: str, autocast: bool) -> bool:
    return dtype == feed.dtype or (autocast and feed.received and {dtype, feed.dtype} <= _AUTOCAST)


def _gradient(data: TensorData, like: Tensor, device: torch.device, name: str) -> Tensor:
    """Return a gradient as a tensor of the dtype of the value it belongs to."""
    result = from_data(data, device)
    if result.shape != like.shape or not result.is_floating_point():
        raise GraphError(
            f"{name} must be {like.dtype} of shape {list(like.shape)}, but is {data.dtype} of shape {list(data.shape)}"
        )
    return result.to(like.dtype)
