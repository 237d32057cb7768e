"""Finds out cheaply whether a module computes in evaluation mode what it computes in training mode.

A trace takes seconds. Here the module runs once in each mode on tensors without data, while every call of torch is
noted: two equal lists of calls are one computation. Calls that have an inference mode (`graph.inference`) may differ in
just that. Where the lists differ otherwise, or cannot be had, only a second trace tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fusionai.graph.capture.layer_classes import as_if_exporting
from fusionai.graph.capture.modes import evaluating, on_meta, training

log = logging.getLogger(__name__)

_DROPOUTS: Mapping[Any, tuple[str, int]] = {
    functional.dropout: ("training", 2),
    functional.dropout1d: ("training", 2),
    functional.dropout2d: ("training", 2),
    functional.dropout3d: ("training", 2),
    functional.alpha_dropout: ("training", 2),
    torch.dropout: ("train", 2),
    torch.alpha_dropout: ("train", 2),
    torch.feature_dropout: ("train", 2),
}
_NORMS: Mapping[Any, tuple[str, int]] = {
    functional.batch_norm: ("training", 5),
    functional.instance_norm: ("use_input_stats", 5),
}
"""Calls with an inference mode: the keyword and the position of the argument that decides."""

_LOOKS = frozenset({"__get__", "untyped_storage"})
"""Functions that only look at a tensor, unless they give another one."""

_SDPA = functional.scaled_dot_product_attention
_ATTENTION = "fusion_trace.attention.default"


def may_differ(
    module: nn.Module,
    run: Callable[[dict[str, Tensor]], Tensor],
    arguments: Mapping[str, Tensor],
    tracing: Callable[[], AbstractContextManager[None]],
) -> bool:
    """Return whether a module may compute something else in evaluation mode than operators in inference mode.

    `run` calls the module on `arguments` and returns its loss; `tracing` is entered for it. The module is as it was
    afterwards.
    """
    bare = {name: tensor.to("meta") for name, tensor in arguments.items()}
    kept: list[object] = []  # in both runs, so that two objects never have one identity
    try:
        with training(module), tracing(), on_meta(module):
            found = _Calls(module, bare, kept, evaluating=False).of(lambda: run(bare))
        with evaluating(module), tracing(), on_meta(module):
            return _Calls(module, bare, kept, evaluating=True).of(lambda: run(bare)) != found
    except Exception:
        log.debug("no run on the meta device; evaluation is traced too", exc_info=True)
        return True


class _Calls(TorchFunctionMode):
    """Notes the calls of torch; a tensor is told by where it comes from, not by its identity."""

    def __init__(
        self, module: nn.Module, inputs: Mapping[str, Tensor], kept: list[object], *, evaluating: bool
    ) -> None:
        super().__init__()
        self._module = module
        self._evaluating = evaluating
        self._buffers = dict(module.named_buffers())
        self._own = {id(tensor): name for name, tensor in (*module.named_parameters(), *self._buffers.items())}
        self._names: dict[int, Hashable] = {id(tensor): ("input", name) for name, tensor in inputs.items()}
        self._names |= self._own
        self._kept = kept
        self._noted: list[Hashable] = []

    def of(self, run: Callable[[], Tensor]) -> Hashable:
        """Return everything that a run calls, its result, and the buffers that it replaces."""
        with as_if_exporting(), self:
            loss = run()
        replaced = [
            (name, self._name(tensor))
            for name, tensor in self._module.named_buffers()
            if self._buffers.get(name) is not tensor
        ]
        return tuple(self._noted), self._name(loss), tuple(replaced)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._evaluating and self._counts(func, args):
            # Inference mode does not write to buffers; whoever reads the new value afterwards tells the modes apart.
            result = func(*args, **kwargs)
            self._names[id(args[0])] = ("written", self._own[id(args[0])])
            return result
        call = self._call(func, args, kwargs)  # before it runs: it may write to its arguments
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if tensors or getattr(func, "__name__", "") not in _LOOKS:
            self._noted.append((call, len(tensors)))
        for place, tensor in enumerate(tensors):
            self._kept.append(tensor)
            self._names[id(tensor)] = (len(self._noted), place)
        return result

    def _counts(self, func: Any, args: Sequence[Any]) -> bool:
        """Return whether a call writes to a buffer in place, as batch normalisation does to count batches."""
        name = getattr(func, "__name__", "")
        in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
        return in_place and bool(args) and any(args[0] is buffer for buffer in self._buffers.values())

    def _call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
        """Return a call without what inference mode decides."""
        attention = self._attention(func, args, kwargs)
        if attention is not None:
            return attention
        flag = _DROPOUTS.get(func)
        if flag is None and func in _NORMS and _argument(args, kwargs, "running_mean", 1) is not None:
            flag = _NORMS[func]
        if flag is not None:
            active = self._evaluating and bool(_argument(args, kwargs, *flag))
            args, kwargs = _without(args, kwargs, *flag)
            return ("active" if active else "", _function(func), self._form(args), self._form(kwargs))
        return (_function(func), self._form(args), self._form(kwargs))

    def _attention(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
        """Return a call of attention without mask, window and softcap; None for any other call.

        A model of transformers calls torch's operator where it drops attention weights out, else ours.
        """
        if func is _SDPA:
            dropped = _argument(args, kwargs, "dropout_p", 4) or 0.0
            if _argument(args, kwargs, "attn_mask", 3) is not None or (self._evaluating and dropped):
                return None
            scale, causal = kwargs.get("scale"), _argument(args, kwargs, "is_causal", 5)
        elif str(func) == _ATTENTION and not args[5] and not args[6]:
            scale, causal = args[4], args[7]
        else:
            return None
        tensors = [_argument(args, kwargs, name, place) for place, name in enumerate(("query", "key", "value"))]
        return ("attention", self._form(tensors), scale, bool(causal))

    def _name(self, tensor: Tensor) -> Hashable:
        """Return where a tensor comes from: an input, the module, a call, or of one never seen the tensor itself."""
        if id(tensor) not in self._names:
            self._kept.append(tensor)
            self._names[id(tensor)] = ("new", id(tensor))
        return self._names[id(tensor)]

    def _form(self, value: Any) -> Hashable:
        """Return something equal for equal arguments; objects that are not plain data equal only themselves."""
        if isinstance(value, Tensor):
            return ("tensor", self._name(value))
        if isinstance(value, (tuple, list)):
            return tuple(self._form(each) for each in value)
        if isinstance(value, Mapping):
            return tuple((str(key), self._form(each)) for key, each in value.items())
        if isinstance(value, slice):
            return ("slice", self._form((value.start, value.stop, value.step)))
        if value is None or isinstance(
            value, (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
        ):
            return (type(value), repr(value))
        self._kept.append(value)
        return ("object", id(value))


def _function(func: Any) -> Hashable:
    """Return a name of a function of torch, the same each time."""
    owner = getattr(func, "__self__", None)
    return (getattr(func, "__module__", ""), getattr(func, "__qualname__", str(func)), repr(owner) if owner else "")


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], name: str, place: int) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _without(
    args: Sequence[Any], kwargs: Mapping[str, Any], name: str, place: int
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    return (
        (*args[:place], *args[place + 1 :]),
        {key: value for key, value in kwargs.items() if key != name},
    )
