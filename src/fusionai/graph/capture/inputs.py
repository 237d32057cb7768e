"""The arguments of a module to capture: example tensors, their roles, and the axes that may change size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusionai.errors import GraphError

Role = Literal["tokens", "labels", "positions", "data"]

ROLES_BY_NAME: Mapping[str, Role] = {
    "input_ids": "tokens",
    "labels": "labels",
}
"""Roles of the usual argument names; every other input is "data" unless the caller says otherwise.

Positions too: what a user gives is fed as it is. Stages derive positions only where the caller asks for that role.
"""

SMALLEST_SIZE = 2
"""Least size of a dynamic axis in an example. The tracer takes an axis of size 0 or 1 for a constant."""


@dataclass(frozen=True, slots=True)
class ExampleInput:
    """One argument of the module to capture."""

    name: str
    tensor: Tensor
    role: Role
    private: bool
    axes: Mapping[int, str]
    """Axes whose size may change, by number, each with the name of the size that it shares with others."""


def example_inputs(
    example: Mapping[str, Tensor],
    roles: Mapping[str, Role] | None,
    private: Collection[str] | None,
    dynamic: Mapping[str, Mapping[int, str]] | None,
) -> tuple[ExampleInput, ...]:
    """Describe the arguments of a module; raises GraphError where the descriptions do not fit the tensors.

    By default everything but positions is private. Axis 0 of every tensor is the batch. Axis 1 of the tokens, and of
    tensors of the same shape, is the length. Stages count positions themselves, so an example of that role must count
    from 0 too.
    """
    _check_names("roles", roles, example)
    _check_names("private", private, example)
    _check_names("dynamic", dynamic, example)
    found: dict[str, Role] = {name: (roles or {}).get(name, ROLES_BY_NAME.get(name, "data")) for name in example}
    for name, role in found.items():
        if role == "positions":
            _refuse_uncounted(name, example[name])
    inputs = tuple(
        ExampleInput(
            name=name,
            tensor=_at_least_two(name, tensor, axes),
            role=found[name],
            private=found[name] != "positions" if private is None else name in private,
            axes=axes,
        )
        for name, tensor in example.items()
        for axes in [dict(dynamic[name]) if dynamic and name in dynamic else _default_axes(name, example, found)]
    )
    sizes: dict[str, int] = {}
    for item in inputs:
        for axis, axis_name in item.axes.items():
            size = sizes.setdefault(axis_name, item.tensor.shape[axis])
            if size != item.tensor.shape[axis]:
                raise GraphError(
                    f"axis {axis} of example input {item.name!r} has size {item.tensor.shape[axis]}, but size "
                    f"{axis_name!r} is {size} in another input; give examples of one size, or name the axes apart"
                )
    return inputs


def resized(inputs: tuple[ExampleInput, ...]) -> dict[str, Tensor]:
    """Return arguments of another size on every dynamic axis, made of the examples' own values.

    Lengths shrink rather than grow, so that a module with a longest sequence takes them.
    """
    sizes: dict[str, int] = {}
    for item in inputs:
        for axis, axis_name in item.axes.items():
            size = item.tensor.shape[axis]
            sizes[axis_name] = size - 1 - size // 4 if size > 3 else size + 1
    return {item.name: _resize(item, sizes) for item in inputs}


def _resize(item: ExampleInput, sizes: Mapping[str, int]) -> Tensor:
    shape = [sizes[item.axes[axis]] if axis in item.axes else size for axis, size in enumerate(item.tensor.shape)]
    tensor = item.tensor
    if item.role == "positions":
        return torch.arange(shape[-1], dtype=tensor.dtype, device=tensor.device).expand(shape).contiguous()
    for axis in item.axes:
        # Reversed, so that no element stays where it was: a value that the tracer took for a constant then shows.
        old = tensor.shape[axis]
        tensor = tensor.index_select(axis, (old - 1 - torch.arange(shape[axis], device=tensor.device)) % old)
    return tensor


def _default_axes(name: str, example: Mapping[str, Tensor], roles: Mapping[str, Role]) -> dict[int, str]:
    tensor = example[name]
    if tensor.ndim == 0:
        return {}
    axes = {0: "batch"}
    tokens = [each for key, each in example.items() if roles[key] == "tokens" and each.ndim > 1]
    # Data of the tokens' shape goes with them: masks, token types, positions of packed documents.
    beside = any(each.shape == tensor.shape for each in tokens)
    if tensor.ndim > 1 and (beside or (roles[name] != "data" and tensor.shape[1] in {e.shape[1] for e in tokens})):
        axes[1] = "length"
    return axes


def _refuse_uncounted(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or tensor.ndim == 0:
        return
    counted = torch.arange(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    if not torch.equal(tensor, counted.expand_as(tensor)):
        raise GraphError(
            f"input {name!r} has the role 'positions', which stages count as 0..T-1 themselves, but its example has "
            "other values; give it the role 'data', so that your values are fed"
        )


def _at_least_two(name: str, tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    for axis in axes:
        if not 0 <= axis < tensor.ndim:
            raise GraphError(
                f"dynamic axis {axis} of input {name!r} does not exist: its example has shape {tuple(tensor.shape)}"
            )
        if tensor.shape[axis] == 0:
            raise GraphError(f"axis {axis} of example input {name!r} is empty; give an example of size 2 or more")
        if tensor.shape[axis] < SMALLEST_SIZE:
            tensor = tensor.repeat_interleave(SMALLEST_SIZE, dim=axis)
    # A copy of its own: one tensor given as two inputs would be traced as one input.
    return tensor.detach().clone()


def _check_names(what: str, given: Collection[str] | None, example: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(given or ()) - set(example))
    if unknown:
        raise GraphError(f"{what} names {', '.join(unknown)}, but the example has {', '.join(example)}")
