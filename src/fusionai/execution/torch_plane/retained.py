"""How much memory the forward passes that wait for their backward hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from fusionai.execution.torch_plane.tensors import storage_address, storage_bytes


def distinct_bytes(tensors: Iterable[Tensor], counted: set[int]) -> int:
    """Return the bytes of the tensors' memory that is not in `counted` yet, and add it there. Views count once."""
    total = 0
    for tensor in tensors:
        address = storage_address(tensor)
        if address not in counted:
            counted.add(address)
            total += storage_bytes(tensor)
    return total


def saved_tensors(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the outputs, and the tensors that torch keeps for their backward. A tensor may come more than once."""
    waiting: list[Node] = []
    for output in outputs:
        yield output
        if output.grad_fn is not None:
            waiting.append(output.grad_fn)
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for name in _saved_names(type(node)):
            yield from _tensors(getattr(node, name))
        waiting.extend(source for source, _ in node.next_functions if source is not None)


@cache
def _saved_names(kind: type) -> tuple[str, ...]:
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    return (*names, "saved_tensors") if hasattr(kind, "saved_tensors") else tuple(names)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
