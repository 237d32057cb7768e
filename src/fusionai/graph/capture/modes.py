"""Puts a module into training or evaluation mode for a trace, and leaves nothing changed behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException
from torch.utils._python_dispatch import TorchDispatchMode

from fusionai.errors import GraphError

_TABLES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, list, set)


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Put an evaluating module into training mode, and restore everything about it afterwards.

    A module that is already training is left alone, so submodules that were frozen on purpose stay frozen. Attributes
    that forward sets while it is traced, such as a cache of masks, are removed: they would hold tensors without data.
    """
    with _restored(module):
        if not module.training:
            _switch(module, train=True)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all its submodules into evaluation mode by `eval()`; restore everything about it afterwards.

    Raises GraphError where a class of its own does more in `eval()` than setting attributes: a module that merges
    weights there computes with other tensors than those that are trained.
    """
    with _restored(module):
        _switch(module, train=False)
        yield


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    before = [
        (each, dict(vars(each)), {table: dict(vars(each)[table]) for table in _TABLES}, _contents(each))
        for each in module.modules()
    ]
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for each, attributes, tables, containers in before:
            vars(each).clear()
            vars(each).update(attributes)
            for table, content in tables.items():
                attributes[table].clear()
                attributes[table].update(content)
            for name, content in containers.items():
                _refill(attributes[name], content)
        for parameter, requires_grad in gradients:
            parameter.requires_grad = requires_grad


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return copies of the containers among a module's own attributes: forward may keep tensors in them."""
    return {
        name: value.copy() for name, value in vars(module).items() if name not in _TABLES and type(value) in _CONTAINERS
    }


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


@contextmanager
def without_data(module: nn.Module) -> Iterator[None]:
    """Let everything in the module be computed on tensors without data: nothing is computed or written to.

    Its parameters and buffers are exchanged meanwhile. Of real ones torch would change those of a single number.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _exchanged(module, mode.from_tensor):
        yield


@contextmanager
def on_meta(module: nn.Module) -> Iterator[None]:
    """Let the module be computed on the meta device: faster than `without_data`, but code that names a device fails."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            bare = tensor.detach().to("meta")
            moved[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
        return moved[id(tensor)]

    with torch.device("meta"), _exchanged(module, move):
        yield


@contextmanager
def _exchanged(module: nn.Module, exchange: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Exchange the parameters and buffers of a module for others; `exchange` gives one tensor for one tensor."""
    with ExitStack() as restore:
        tables: list[dict[str, Any]] = [
            table for each in module.modules() for table in (each._parameters, each._buffers)
        ]
        for table in tables:
            restore.callback(_refill, table, table.copy())
            for name, tensor in table.items():
                with suppress(UnsupportedFakeTensorException):  # sparse tensors, for example
                    table[name] = None if tensor is None else exchange(tensor)
        yield


def _switch(module: nn.Module, *, train: bool) -> None:
    """Call `train()` or `eval()`. Where a class overrides them, raise GraphError if the call changes a tensor."""
    plain = (nn.Module.train, nn.Module.eval)
    if all((type(each).train, type(each).eval) == plain for each in module.modules()):
        module.train(train)
        return
    call = f"{type(module).__name__}.{'train' if train else 'eval'}()"
    remedy = (
        "call it before the module is handed in"
        if train
        else "let it set attributes only, or train without held-out data"
    )
    before = [(tensor, tensor.detach(), _storage(tensor)) for tensor in _tensors(module).values()]
    names = {name: id(tensor) for name, tensor in _tensors(module).items()}
    with _NoWrites(call, remedy):
        module.train() if train else module.eval()
    changed = {name: id(tensor) for name, tensor in _tensors(module).items()} != names
    for tensor, alias, storage in before:
        if _storage(tensor) != storage:
            tensor.data, changed = alias, True
    if changed:
        raise GraphError(f"{call} exchanges tensors of the module; {remedy}")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by each of its names."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(named)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _NoWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operator that writes to a tensor, before it does."""

    def __init__(self, call: str, remedy: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call, self._remedy = call, remedy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise GraphError(f"{self._call} writes to a tensor of the module ({func}); {self._remedy}")
        return func(*args, **(kwargs or {}))
