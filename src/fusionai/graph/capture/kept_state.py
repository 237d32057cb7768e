"""Refuses modules that keep something besides tensors from one call to the next.

An attribute that each call sets before it reads it is no such state: what it was before the call matters to nothing.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionai.errors import GraphError
from fusionai.graph.capture.call_state import AttributeChange
from fusionai.graph.capture.layer_classes import as_if_exporting

log = logging.getLogger(__name__)

Attribute = tuple[str, str]
"""Path of a module, and the name of an attribute of its."""

_NOT_OF_THE_MODEL = ("torch.", "fusionai.graph.capture.")
"""Code that looks at the attributes of every module, whatever they mean to the model."""


_NAMED = 3
"""Changes that an error names; a model with one mistake often makes it in every layer."""


def refuse_kept_state(
    changes: Sequence[AttributeChange], modules: Mapping[str, nn.Module], run: Callable[[], object]
) -> None:
    """Raise GraphError, naming the attributes, if a call changes attributes that the next call may read.

    `modules` are the modules of the changes by path; `run` makes a call, as for `set_before_read`.
    """
    whole = {(each.module, each.attribute) for each in changes if each.whole}
    harmless = set_before_read(modules, whole, run) if whole else frozenset()
    kept = [each for each in changes if not each.whole or (each.module, each.attribute) not in harmless]
    if kept:
        named = ", ".join(repr(each.path) for each in kept[:_NAMED])
        more = f" and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
        raise GraphError(
            f"the module changes {named}{more} in forward; an OP-DAG keeps tensors only, so every step would find the "
            "first value there. Keep it in a buffer (self.register_buffer in __init__, then assign or update it in "
            "forward), or compute it outside of the module"
        )


def set_before_read(
    modules: Mapping[str, nn.Module], attributes: Collection[Attribute], run: Callable[[], object]
) -> frozenset[Attribute]:
    """Return those of some attributes whose first use in a call is that they are set.

    `run` makes the call; it runs on fake tensors, so nothing is computed. The result is empty when it fails.
    """
    first: dict[tuple[int, str], bool] = {}
    try:
        with _watched(modules, attributes, first), _on_fake_tensors():
            run()
    except Exception:
        log.debug("no run on fake tensors; every attribute counts as read", exc_info=True)
        return frozenset()
    return frozenset((path, name) for path, name in attributes if first.get((id(modules[path]), name)))


@contextmanager
def _on_fake_tensors() -> Iterator[None]:
    """Have what is called run as in a trace, on tensors without values, so that nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), as_if_exporting():
        yield


@contextmanager
def _watched(
    modules: Mapping[str, nn.Module], attributes: Collection[Attribute], first: dict[tuple[int, str], bool]
) -> Iterator[None]:
    """Note in `first`, by module and name, whether the first use of an attribute sets it."""
    kinds = {path: type(modules[path]) for path, _ in attributes}
    try:
        for path, kind in kinds.items():
            names = frozenset(name for own, name in attributes if own == path)
            modules[path].__class__ = _watching(kind, names, first)
        yield
    finally:
        for path, kind in kinds.items():
            modules[path].__class__ = kind


def _watching(kind: type[nn.Module], names: frozenset[str], first: dict[tuple[int, str], bool]) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> object:
        if name in names:
            first.setdefault((id(self), name), False)
        elif name == "__dict__" and not sys._getframe(1).f_globals.get("__name__", "").startswith(_NOT_OF_THE_MODEL):
            for each in names:
                first.setdefault((id(self), each), False)
        return kind.__getattribute__(self, name)

    def write(self: nn.Module, name: str, value: object) -> None:
        if name in names:
            first.setdefault((id(self), name), True)
        kind.__setattr__(self, name, value)  # type: ignore[arg-type]

    def delete(self: nn.Module, name: str) -> None:
        if name in names:
            first.setdefault((id(self), name), False)
        kind.__delattr__(self, name)

    content = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__getattribute__": read,
        "__setattr__": write,
        "__delattr__": delete,
    }
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(content))
