"""Buffers that a call gives a new tensor become buffers that it writes to in place, which an OP-DAG can say.

`self.seen = self.seen + 1` puts another tensor into the module. A trace reads the old one and cannot see that the next
call is to find the new one, so at the end of the call the new value is copied into the old tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fusionai.errors import GraphError
from fusionai.graph.capture.call_state import Snapshot


def tensor_memory(before: Snapshot) -> dict[str, int]:
    """Return the memory of every parameter and buffer of a module, by the tensor's path."""
    return {
        path: _memory(tensor)
        for table in ("_parameters", "_buffers")
        for path, _, _, tensor in before.table(table)
        if isinstance(tensor, Tensor)
    }


def write_back(before: Snapshot, memory: Mapping[str, int]) -> None:
    """Copy what a call assigned to buffers into the tensors that they had before it, and put those back.

    Args:
        before: the module before the call.
        memory: `tensor_memory` of it, taken before the call.

    Raises GraphError, naming the tensor, for what cannot become a write in place: a parameter that is replaced, a
    buffer that the call creates, one whose dtype or shape changes, or one that has a second name.
    """
    _refuse_new_parameters(before)
    _refuse_new_memory(before, memory)
    assigned: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    taken: dict[int, str] = {}
    for path, module, name, old, new in before.table_changes("_buffers"):
        if isinstance(old, Tensor) and isinstance(new, Tensor) and _is_whole(old, new):
            module._buffers[name] = old
            continue
        _refuse_unlike(path, old, new)
        _refuse_shared(path, old, before)
        _refuse_second_name(path, _memory(new), before, taken)
        taken[_memory(new)] = path
        assigned.append((module, name, old, new))
    # A value that lies in the memory of a buffer must be read before any buffer is written to.
    buffers = {_memory(tensor) for _, _, _, tensor in before.table("_buffers") if isinstance(tensor, Tensor)}
    values = [new.clone() if _memory(new) in buffers else new for _, _, _, new in assigned]
    for (module, name, old, _), value in zip(assigned, values, strict=True):
        old.copy_(value)
        module._buffers[name] = old


def _refuse_new_parameters(before: Snapshot) -> None:
    for path, _, _, old, new in before.table_changes("_parameters"):
        done = (
            "gives the parameter {} another tensor" if old is not None and new is not None else "sets the parameter {}"
        )
        raise GraphError(
            f"the module {done.format(repr(path))} in forward; only the optimizer may change a parameter, so compute "
            "the value that you need from it instead, and create all parameters in __init__"
        )
    for path, _, _, _, _ in before.table_changes("_modules"):
        raise GraphError(f"the module changes its submodule {path!r} in forward; create all submodules in __init__")


def _refuse_new_memory(before: Snapshot, memory: Mapping[str, int]) -> None:
    for path, now in tensor_memory(before).items():
        if memory[path] != now:
            raise GraphError(
                f"the module replaces the memory of {path!r} in forward (by .data = ..., set_ or resize_), which a "
                "trace cannot follow; assign a new tensor to a buffer instead, and leave parameters to the optimizer"
            )


def _refuse_unlike(path: str, old: Any, new: Any) -> None:
    if not isinstance(old, Tensor):
        raise GraphError(
            f"the module gives the buffer {path!r} its first tensor in forward; register it with a tensor of its final "
            "shape and dtype in __init__"
        )
    if not isinstance(new, Tensor):
        raise GraphError(f"the module takes the tensor of the buffer {path!r} away in forward; keep a tensor in it")
    # A size that depends on the input is no int. Comparing it would tie the trace to one size.
    whole = all(isinstance(size, int) for size in new.shape)
    if not whole or tuple(new.shape) != tuple(old.shape) or new.dtype != old.dtype:
        found = ", ".join(str(size) if isinstance(size, int) else "?" for size in new.shape)
        raise GraphError(
            f"the module gives the buffer {path!r}, {old.dtype} of shape {list(old.shape)}, a tensor of {new.dtype} "
            f"and shape [{found}] in forward; keep its dtype and shape"
        )


def _refuse_shared(path: str, old: Tensor, before: Snapshot) -> None:
    for table in ("_parameters", "_buffers"):
        for other, _, _, tensor in before.table(table):
            if other != path and isinstance(tensor, Tensor) and _memory(tensor) == _memory(old):
                raise GraphError(
                    f"the module assigns a new tensor to the buffer {path!r} in forward, which {other!r} shares until "
                    "then; write to it in place, or register two tensors"
                )


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _refuse_second_name(path: str, memory: int, before: Snapshot, assigned: Mapping[int, str]) -> None:
    if memory in assigned:
        raise GraphError(
            f"the module assigns one tensor to the buffers {assigned[memory]!r} and {path!r} in forward; assign a "
            "clone() to one of them"
        )
    for table in ("_parameters", "_buffers"):
        for other, module, name, tensor in before.table(table):
            if isinstance(tensor, Tensor) and _memory(tensor) == memory and vars(module)[table].get(name) is tensor:
                raise GraphError(
                    f"the module assigns the tensor of {other!r} to the buffer {path!r} in forward, so that both are "
                    "one; assign a clone() of it"
                )


def _is_whole(old: Tensor, new: Tensor) -> bool:
    """Return whether two tensors show the same elements of one memory in the same order."""
    return (
        _memory(new) == _memory(old)
        and new.dtype == old.dtype
        and all(isinstance(size, int) for size in new.shape)
        and (tuple(new.shape), new.stride(), new.storage_offset())
        == (tuple(old.shape), old.stride(), old.storage_offset())
    )
