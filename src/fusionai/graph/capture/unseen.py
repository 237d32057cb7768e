"""Refuses what leaves no operator in a trace: own backward passes, hooks on gradients, and Python's random numbers.

A trace records the operators that forward runs. How a gradient is changed on its way back is not among them, and a
number that Python draws becomes a constant. The captured graph would have the module's loss and train something else.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

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


@contextmanager
def refusing_unseen(name: str) -> Iterator[None]:
    """Raise GraphError when the module called `name` does, while it is traced here, what a trace does not show."""
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
