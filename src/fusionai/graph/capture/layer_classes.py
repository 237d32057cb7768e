"""Finds layers of a module that do the same: they have equal structure and are called in the same way.

Two layers are of one class when their submodules, tensor shapes and settings agree (except for a setting that is the
layer's own number), and when the module gives both the same arguments. Some models choose a layer's mask or positions
by its number outside of the layer, so the arguments are recorded in one run on fake tensors, which computes nothing.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusionai.graph.capture.state import ModuleState

log = logging.getLogger(__name__)

Layers = nn.ModuleList | nn.Sequential

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = tuple(sorted(name for name in _INTERNAL if name.endswith(("_hooks", "_pre_hooks"))))


def layer_classes(
    lists: Mapping[str, Layers], run: Callable[[], object], state: ModuleState
) -> dict[str, list[Hashable]]:
    """Return a class for each layer of each list, by the list's path; lists with irregular layers are left out.

    `run` calls the module that holds the lists on example inputs without data; it is called once.
    """
    calls = _watch_calls(lists, run)
    if calls is None:
        return {}
    classes: dict[str, list[Hashable]] = {}
    for path, layers in lists.items():
        structures = _structures(path, layers, state)
        if structures is not None and path in calls:
            classes[path] = list(zip(structures, calls[path], strict=True))
    return classes


# --- structure ------------------------------------------------------------------------------------------------


def _structures(path: str, layers: Layers, state: ModuleState) -> list[Hashable] | None:
    """Return the parts of each layer, or None where hooks may change what a layer does."""
    settings = []
    for layer in layers:
        if any(getattr(each, hooks, None) for each in layer.modules() for hooks in _HOOKS):
            return None
        settings.append(
            {
                (own, key): value
                for own, each in layer.named_modules()
                for key, value in vars(each).items()
                if key not in _INTERNAL
            }
        )
    numbers = {
        key
        for key in set().union(*settings)
        if all(
            isinstance(each[key], int) and not isinstance(each[key], bool) and each[key] == number
            for number, each in enumerate(settings)
            if key in each
        )
    }
    return [
        (
            tuple((name, type(part)) for name, part in layer.named_modules()),
            tuple((key, _fingerprint(value, own)) for key, value in each.items() if key not in numbers),
            tuple(
                (name, tuple(tensor.shape), tensor.dtype, _shared(f"{path}.{number}.", name, state))
                for name, tensor in (
                    *layer.named_parameters(remove_duplicate=False),
                    *layer.named_buffers(remove_duplicate=False),
                )
            ),
        )
        for number, (layer, each) in enumerate(zip(layers, settings, strict=True))
        for own in [{id(part): name for name, part in layer.named_modules()}]
    ]


def _shared(prefix: str, name: str, state: ModuleState) -> str:
    """Return the place of the tensor that a layer's tensor is tied to, inside the layer or outside of it."""
    key = state.canonical[prefix + name]
    return key.removeprefix(prefix) if key.startswith(prefix) else f"/{key}"


def _fingerprint(value: object, own: Mapping[int, str]) -> Hashable:
    """Return something equal for equal settings; objects that are not plain data equal only themselves.

    `own` names the submodules of the layer by their identity, so that a method of one equals another layer's.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return (type(value), repr(value))
    if isinstance(value, (tuple, list)):
        return (type(value), *(_fingerprint(each, own) for each in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(_fingerprint(each, own) for each in value))
    if isinstance(value, dict):
        return (
            type(value),
            *((_fingerprint(key, own), _fingerprint(each, own)) for key, each in value.items()),
        )
    if isinstance(value, functools.partial):
        return ("partial", *(_fingerprint(each, own) for each in (value.func, value.args, value.keywords)))
    if isinstance(value, types.MethodType):
        return ("method", _fingerprint(value.__func__, own), _fingerprint(value.__self__, own))
    return ("own", own[id(value)]) if id(value) in own else ("object", id(value))


# --- calls ----------------------------------------------------------------------------------------------------


class _Calls:
    """The arguments that the layers of one list were called with, in order."""

    def __init__(self, names: dict[int, int]) -> None:
        self._names = names
        self._previous: list[Any] = []
        self.order: list[int] = []
        self.records: list[Hashable] = []

    def enter(self, number: int, arguments: object) -> None:
        leaves, structure = pytree.tree_flatten(arguments)
        self.order.append(number)
        self.records.append((str(structure), *(self._leaf(leaf) for leaf in leaves)))

    def leave(self, output: object) -> None:
        self._previous = pytree.tree_leaves(output)

    def _leaf(self, leaf: object) -> Hashable:
        if isinstance(leaf, Tensor):
            for place, each in enumerate(self._previous):
                if each is leaf:
                    return ("previous", place)
            return ("tensor", self._names.setdefault(id(leaf), len(self._names)))
        return _fingerprint(leaf, {})


def _watch_calls(lists: Mapping[str, Layers], run: Callable[[], object]) -> dict[str, list[Hashable]] | None:
    """Return how each layer is called, or None when the module cannot run on fake tensors."""
    names: dict[int, int] = {}
    alive: list[object] = []
    watched = {path: _Calls(names) for path in lists}
    with ExitStack() as hooks:
        for path, layers in lists.items():
            for number, layer in enumerate(layers):
                _attach(hooks, layer, number, watched[path], alive)
        try:
            with torch.no_grad(), as_if_exporting():
                run()
        except Exception:
            log.debug("no run on fake tensors; blocks are traced one by one", exc_info=True)
            return None
    return {path: calls.records for path, calls in watched.items() if calls.order == list(range(len(lists[path])))}


@contextmanager
def as_if_exporting() -> Iterator[None]:
    """Tell models that they are being traced, so that they take the same path as in the trace."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {flag: getattr(torch.compiler, flag, False) for flag in flags}
    try:
        for flag in flags:
            setattr(torch.compiler, flag, True)
        yield
    finally:
        for flag, value in before.items():
            setattr(torch.compiler, flag, value)


def _attach(hooks: ExitStack, layer: nn.Module, number: int, calls: _Calls, alive: list[object]) -> None:
    def before(_: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        # Tensors are told apart by identity, so none may be freed while names are given.
        alive.append((args, kwargs))
        calls.enter(number, (args, kwargs))

    def after(_: nn.Module, args: Sequence[object], output: object) -> None:
        alive.append(output)
        calls.leave(output)

    hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
    hooks.callback(layer.register_forward_hook(after).remove)
