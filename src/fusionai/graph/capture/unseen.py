"""Refuses what a trace does not show: own backward passes, hooks on gradients, Python's random numbers, shared memory.

A trace records the operators that forward runs. How a gradient is changed on its way back is not among them, a number
that Python draws becomes a constant, and an update of one tensor changes no other. The captured graph would have the
module's loss and train something else.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fusionai.errors import GraphError

_HARMLESS = frozenset({"_NoopSaveInputs"})
"""Functions of torch's non-reentrant checkpoint; they pass every gradient on as it is."""


def refuse_gradient_hooks(module: nn.Module) -> None:
    """Raise GraphError naming the parameter or submodule that has a hook on its gradients."""
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise GraphError(
                f"the gradient of {name!r} has a hook, which compnodes would not run; remove it, and use "
                "training.gradient_clip to bound gradients"
            )
    for path, each in module.named_modules():
        if each._backward_hooks or each._backward_pre_hooks:
            raise GraphError(
                f"{f'module {path!r}' if path else 'the model itself'} has a backward hook, which compnodes would not "
                "run; remove it"
            )


def refuse_shared_memory(module: nn.Module) -> None:
    """Raise GraphError for a trained parameter in whose memory another tensor of the module lies, too.

    torch's update of the parameter changes both. One parameter under two names is tied, and that is seen.
    """
    named: dict[int, tuple[str, Tensor]] = {}
    for path, each in module.named_modules():
        own = {**each._parameters, **each._buffers, **vars(each)}
        for name, value in own.items():
            if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and value.numel():
                named.setdefault(id(value), (f"{path}.{name}" if path else name, value))
    ranges = sorted((*_memory(tensor), name, tensor) for name, tensor in named.values())
    furthest: tuple[int, str, Tensor] | None = None
    for start, stop, name, tensor in ranges:
        if furthest is not None and start < furthest[0]:
            pair = (furthest[1:], (name, tensor))
            trained = [each for each in pair if isinstance(each[1], nn.Parameter) and each[1].requires_grad]
            if trained:
                other = next(each[0] for each in pair if each is not trained[0])
                raise GraphError(
                    f"{other!r} lies in the memory of the parameter {trained[0][0]!r}, so training changes both, which "
                    "a trace does not show; assign the parameter itself to tie two weights, or give the tensor its own "
                    "memory with .clone()"
                )
        if furthest is None or stop > furthest[0]:
            furthest = stop, name, tensor


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses from the first to the last byte of a tensor, the end excluded."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


_FREEZING: tuple[Any, ...] = (Tensor.requires_grad_, vars(torch._C.TensorBase)["requires_grad"].__set__)


class _Strangers(TorchFunctionMode):
    """Refuses tensors that require a gradient and are no parameters of the module: a trace takes them for constants."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._name = name
        self._own = {id(parameter) for parameter in module.parameters()}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _FREEZING and isinstance(args[0], nn.Parameter) and args[0].requires_grad:
            self._refuse_freezing((*args[1:], *(kwargs or {}).values()))
        result = func(*args, **(kwargs or {}))
        if func is not Tensor.detach and any(map(_passes_gradient, pytree.tree_leaves(result))):
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and self._stranger(leaf):
                    raise GraphError(
                        f"{self._name} computes with a tensor of shape {list(leaf.shape)} that requires a gradient and "
                        f"is none of its parameters{_user_line()}, so nothing would train it; put it into the module, "
                        "as a parameter or with the module that holds it (a loss with weights of its own, for "
                        "example), or detach() it"
                    )
        return result

    def _refuse_freezing(self, given: Sequence[Any]) -> None:
        if False in given:
            raise GraphError(
                f"{self._name} freezes a parameter while it computes{_user_line()}, which a trace does not show; "
                "freeze it before the module is handed in, or use its detach()"
            )

    def _stranger(self, tensor: Tensor) -> bool:
        return _passes_gradient(tensor) and id(tensor) not in self._own


def _passes_gradient(value: object) -> bool:
    with torch._C.DisableTorchFunction():
        return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def refusing_unseen(module: nn.Module) -> Iterator[None]:
    """Raise GraphError when a module does, while it is traced here, what a trace does not show."""
    name = type(module).__name__
    function, inference = torch.autograd.Function, torch.inference_mode
    apply, enter = function.__dict__["apply"], inference.__enter__

    def applied(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
        # A custom operator has such a function too, but is an operator in the trace.
        harmless = kind.__name__ in _HARMLESS or kind.__module__ == "torch._library.autograd"
        if torch.is_grad_enabled() and not harmless:
            _refuse_function(name, kind)
        return apply.__get__(None, kind)(*args, **kwargs)

    def hooked(tensor: Tensor, hook: Callable[..., object]) -> NoReturn:
        raise GraphError(
            f"{name} puts a hook on a gradient{_user_line()}, which compnodes would not run; remove it, or compute in "
            "forward what it does"
        )

    def entered(mode: Any) -> None:
        if mode.mode and not _called_by_torch(sys._getframe(1)):
            raise GraphError(
                f"{name} enters torch.inference_mode{_user_line()}, which a trace does not show; use torch.no_grad or "
                "detach() where no gradient shall pass"
            )
        enter(mode)

    drawn = _generators()
    with ExitStack() as restore:
        restore.enter_context(_Strangers(name, module))
        for place, attribute, ours in (
            (function, "apply", classmethod(applied)),
            (Tensor, "register_hook", hooked),
            (Tensor, "register_post_accumulate_grad_hook", hooked),
            (inference, "__enter__", entered),
        ):
            restore.callback(setattr, place, attribute, place.__dict__[attribute])
            setattr(place, attribute, ours)
        yield
    if _generators() != drawn:
        raise GraphError(
            f"{name} draws numbers from Python's random or numpy's random while it computes; a captured model would "
            "use the first ones for ever. Draw with torch.rand_like or torch.randn_like, or leave it out"
        )


def _refuse_function(name: str, kind: type[Any]) -> NoReturn:
    if kind.__name__ == "CheckpointFunction":
        raise GraphError(f"{name} uses checkpoint with use_reentrant=True{_user_line()}; pass use_reentrant=False")
    raise GraphError(
        f"{name} uses {kind.__qualname__}{_user_line()}, a torch.autograd.Function whose backward a trace does not "
        "show; write it with operators of torch. f(x) with the gradient of g(x) is g(x) + (f(x) - g(x)).detach()"
    )


def _called_by_torch(frame: FrameType | None) -> bool:
    """Return whether a context was entered by torch itself, as it does while it traces; decorators do not count."""
    while frame is not None and frame.f_globals.get("__name__") == "torch.utils._contextlib":
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "torch"


def _generators() -> tuple[object, object]:
    """Return the states of the generators whose numbers a trace takes for constants."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, np.asarray(keys).tobytes(), *rest)


def _user_line() -> str:
    """Return " (file.py:12, in forward)" for the innermost running line that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in ("torch", "fusionai") and not frame.f_code.co_filename.startswith("<"):
            file = frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
            return f" ({file}:{frame.f_lineno}, in {frame.f_code.co_name})"
        frame = frame.f_back
    return ""
