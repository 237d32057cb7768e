"""Proves that the positions 0..T-1 are those that a model takes by itself, so that they may be an input of its graph.

Most models number their tokens from 0 when they are given no `position_ids`. RoBERTa and its relatives start behind the
padding token's number and skip padding. Feeding them 0..T-1 would train another model without a word, so positions are
an input only where this module finds no difference, and the model computes its own everywhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fusionai.errors import GraphError

log = logging.getLogger(__name__)

POSITIONS = "position_ids"

_LARGEST_RECORDED = 1 << 22
"""Most elements of a tensor whose values are compared. Positions and masks of the example are far smaller."""

_PADDED_EVERY = 5
"""Every such token of the example is padding. Models that derive positions from padding then differ from 0..T-1."""


def takes_counted_positions(
    model: nn.Module, example: Mapping[str, Tensor], fixed: Mapping[str, object], *, argument: bool
) -> bool:
    """Return whether a model computes the same with positions 0..T-1 as without any.

    Args:
        model: a language model of transformers, on any device; the meta device too.
        example: `input_ids` and `labels`, int64 (batch, length), without positions.
        fixed: further arguments of the model.
        argument: whether the model has the argument at all.

    Both calls run without the weights' values: see `_Following`. The answer is False for whatever fails, except
    that GraphError of a model that cannot be captured is raised.
    """
    # Of one sequence: a model may make the positions of a single row, for all rows of the batch.
    given = {name: tensor[:1].to("cpu", copy=True) for name, tensor in example.items()}
    tokens = given["input_ids"]
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(padding, int):
        tokens[:, 1::_PADDED_EVERY] = padding
    counted = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
    try:
        state = _without_weights(model)
        without = _followed(model, state, {**fixed, **given})
        if not argument:
            return False
        with_them = _followed(model, state, {**fixed, **given, POSITIONS: counted})
    except GraphError:
        raise
    except Exception:
        log.debug("positions stay the model's own: a call without weights failed", exc_info=True)
        return False
    same = len(without) == len(with_them) and all(map(_equal, without, with_them))
    if not same:
        log.info("%s has positions of its own; they are no input of the graph", type(model).__name__)
    return same


def _followed(model: nn.Module, state: Mapping[str, Tensor], arguments: Mapping[str, object]) -> list[list[Any]]:
    following = _Following()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), following:
        torch.manual_seed(0)
        functional_call(model, dict(state), (), dict(arguments))
    return following.calls


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a model whose parameters have no values, and notes what they are combined with.

    What is computed from tokens, positions and buffers alone is computed. An operator that takes a tensor without
    values gives one again; it is noted with the values of its other arguments. Two calls with equal notes differ in
    nothing that reaches a weight.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[list[Any]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            # Factories asked for the device of the weights, and copies to it, stay where values are.
            real = [torch.device("cpu") if isinstance(leaf, torch.device) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(real, structure)
            return func(*args, **kwargs)
        self.calls.append([str(func), *(_noted(leaf) for leaf in leaves)])
        moved = [leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(
            [torch.device("meta") if isinstance(leaf, torch.device) else leaf for leaf in moved], structure
        )
        return func(*args, **kwargs)


def _noted(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, float) else leaf
    if leaf.is_meta:
        return ("without values", leaf.dtype, tuple(leaf.shape))
    if leaf.numel() > _LARGEST_RECORDED:
        raise ValueError(f"a tensor of shape {tuple(leaf.shape)} is too large to be compared")
    return leaf.detach().clone()


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if isinstance(one, Tensor) or isinstance(other, Tensor):
            if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype):
                return False
            if not (one.shape == other.shape and torch.equal(one, other)):
                return False
        elif type(one) is not type(other) or one != other:
            return False
    return True


def _without_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model: parameters without values, and buffers with theirs where they can be had.

    The integer buffers of a model on the meta device, such as BERT's positions, are computed again: a new module of the
    same class makes them.
    """
    state: dict[str, Tensor] = {name: parameter.detach().to("meta") for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        lost = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and not buffer.is_floating_point()
        }
        made = _made_again(module, model) if lost else {}
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) in seen:
                continue
            seen.add(id(buffer))
            key = f"{path}.{name}" if path else name
            again = made.get(name)
            if name in lost and again is not None and (again.shape, again.dtype) == (buffer.shape, buffer.dtype):
                buffer = again
            state[key] = buffer.detach().clone() if buffer.is_meta else buffer.detach().cpu().clone()
    return state


def _made_again(module: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    make: Callable[..., nn.Module] = type(module)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return dict(make(getattr(model, "config", None)).named_buffers(recurse=False))
    except Exception:
        log.debug("%s cannot be made again from the model's config", type(module).__name__, exc_info=True)
        return {}
