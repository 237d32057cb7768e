"""What a module keeps between two calls, beside the values of its tensors, and what one call changes of it.

An OP-DAG has tensors only. A number, a list or a helper object that a call changes would be captured as the constant
that it was during the trace, so such a change is found by comparing the module before and after a call.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TABLES = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that hold its tensors and submodules by name."""

_DEEPEST = 4
"""Levels of containers and objects in an attribute that are compared. What lies deeper is found only if it changes the
loss of a second call."""

_LARGEST_ARRAY_BYTES = 1 << 20
"""A numpy array up to this size is compared by its content. A larger one would make every capture slower."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range)
_CONTAINERS = (list, dict, set, collections.deque)
_OPAQUE = (
    nn.Module,
    Tensor,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    torch.Generator,
)
"""Values that are compared by identity. Their content is code, or is compared elsewhere."""


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """Something that a call changed."""

    path: str
    """As the module's code would name it: "layers.3.count", "history[0]", "meter.total"."""
    module: str
    """Path of the module that has the attribute."""
    attribute: str
    whole: bool
    """Whether the attribute itself has another value now. Otherwise the object that it holds has changed inside."""


@dataclass(frozen=True, slots=True)
class _Held:
    """One container or object that an attribute of a module holds, with its content at the time of the snapshot."""

    path: str
    module: str
    attribute: str
    holder: Any
    content: Any
    whole: bool


class Snapshot:
    """The attributes of a module and its submodules at one moment."""

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        """`roots`: modules by the prefix of their paths."""
        self.modules: dict[str, nn.Module] = {}
        seen: set[int] = set()
        for prefix, root in roots.items():
            for name, each in root.named_modules():
                if id(each) not in seen:
                    seen.add(id(each))
                    self.modules[".".join(filter(None, (prefix, name)))] = each
        self._held: list[_Held] = []
        self._known: set[int] = set()
        for path, each in self.modules.items():
            content = dict(vars(each))
            self._held.append(_Held(path, path, "", vars(each), content, True))
            for name, value in content.items():
                self._take(value, _joined(path, name), path, name, _DEEPEST if name not in TABLES else 1)

    def changes(self) -> Iterator[AttributeChange]:
        """Yield what is different now, except for parameters, buffers and submodules."""
        for held in self._held:
            if held.attribute in TABLES:
                continue
            for name in _differences(held.content, held.holder):
                if held.whole:
                    if name not in TABLES:
                        yield AttributeChange(_joined(held.path, name), held.module, name, True)
                else:
                    yield AttributeChange(_inside(held, name), held.module, held.attribute, False)

    def table_changes(self, table: str) -> Iterator[tuple[str, nn.Module, str, Any, Any]]:
        """Yield (path, module, name, before, now) of each entry of a table that is another object now, or None."""
        for held in self._held:
            if held.attribute == table:
                module = self.modules[held.module]
                now = vars(module)[table]
                for name in {**held.content, **now}:
                    if held.content.get(name) is not now.get(name):
                        yield _joined(held.module, name), module, name, held.content.get(name), now.get(name)

    def table(self, table: str) -> Iterator[tuple[str, nn.Module, str, Any]]:
        """Yield (path, module, name, value) of each entry of a table at the time of the snapshot."""
        for held in self._held:
            if held.attribute == table:
                for name, value in held.content.items():
                    yield _joined(held.module, name), self.modules[held.module], name, value

    def restore(self) -> None:
        """Give every attribute, container and object the content that it had."""
        for held in self._held:
            if _is_same(held.content, _content(held.holder)):
                continue
            if isinstance(held.holder, list):
                held.holder[:] = held.content
            elif isinstance(held.holder, (dict, set)):
                held.holder.clear()
                held.holder.update(held.content)
            elif isinstance(held.holder, collections.deque):
                held.holder.clear()
                held.holder.extend(held.content)
            elif isinstance(held.holder, np.ndarray):
                held.holder[...] = held.content
            else:
                vars(held.holder).clear()
                vars(held.holder).update(held.content)

    def _take(self, value: Any, path: str, module: str, attribute: str, depth: int) -> None:
        if depth == 0 or isinstance(value, (*_PLAIN, *_OPAQUE)) or id(value) in self._known:
            return
        content = _content(value)
        if content is None:
            return
        self._known.add(id(value))
        self._held.append(_Held(path, module, attribute, value, content, False))
        if attribute in TABLES or isinstance(value, np.ndarray):
            return
        inner: Sequence[tuple[Any, Any]]
        inner = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
        own = not isinstance(value, _CONTAINERS) and not isinstance(value, tuple)
        for key, each in inner:
            self._take(each, f"{path}.{key}" if own else f"{path}[{key!r}]", module, attribute, depth - 1)


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Undo afterwards what happens to the attributes of a module and its submodules, those in containers included."""
    before = Snapshot({"": root})
    try:
        yield
    finally:
        before.restore()


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _inside(held: _Held, key: Any) -> str:
    if isinstance(held.holder, (set, np.ndarray)) or key is None:
        return held.path
    return f"{held.path}[{key!r}]" if isinstance(held.holder, _CONTAINERS) else f"{held.path}.{key}"


def _content(value: Any) -> Any:
    """Return a copy of what a container or an object holds, or None for what is not looked into."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, set):
        return set(value)
    if isinstance(value, collections.deque):
        return list(value)
    if isinstance(value, np.ndarray):
        return value.copy() if value.nbytes <= _LARGEST_ARRAY_BYTES and not value.dtype.hasobject else None
    attributes = getattr(value, "__dict__", None)
    return dict(attributes) if isinstance(attributes, dict) else None


def _differences(before: Any, holder: Any) -> Iterator[Any]:
    """Yield the keys under which a holder has other content than before; None where there is no key to name."""
    now = _content(holder)
    if isinstance(before, dict):
        assert isinstance(now, dict)
        missing = object()
        for key in {**before, **now}:
            if not _is_same(before.get(key, missing), now.get(key, missing)):
                yield key
    elif isinstance(before, list):
        for place in range(max(len(before), len(now))):
            if place >= len(before) or place >= len(now) or not _is_same(before[place], now[place]):
                yield place
    elif not _is_same(before, now):
        yield None


def _is_same(before: Any, now: Any) -> bool:
    """Return whether two values are one object, or are equal plain data."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, _PLAIN):
        return repr(before) == repr(now)
    if isinstance(before, np.ndarray):
        return before.dtype == now.dtype and np.array_equal(before, now, equal_nan=before.dtype.kind == "f")
    if isinstance(before, (list, tuple, collections.deque)):
        return len(before) == len(now) and all(map(_is_same, before, now))
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(_is_same(before[key], now[key]) for key in before)
    if isinstance(before, set):
        return bool(before == now)
    if isinstance(before, types.MethodType):
        return before.__func__ is now.__func__ and before.__self__ is now.__self__
    return False


@dataclass(slots=True)
class CallChanges:
    """What the last call of a module changed of its attributes."""

    last: tuple[AttributeChange, ...] = ()
