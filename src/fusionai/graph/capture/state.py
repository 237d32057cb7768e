"""The tensors that a module holds: their keys, ties, kinds, and how to read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fusionai.errors import GraphError
from fusionai.graph.capture.dtypes import dtype_name
from fusionai.graph.model import TensorType, ValueName, Weight, WeightKey
from fusionai.tensor import TensorData

LARGEST_CONSTANT_BYTES = 1 << 24
"""Most bytes of a constant that the model makes while it is traced. A larger one is a table that the model computes
again on every call; it belongs into a buffer."""


@dataclass(frozen=True, slots=True)
class _StateEntry:
    tensor: Tensor
    kind: Literal["parameter", "buffer", "constant"]
    aliases: tuple[WeightKey, ...]


@dataclass(frozen=True)
class ModuleState:
    """Every parameter, buffer and constant of a module, tied ones once."""

    entries: dict[WeightKey, _StateEntry]
    canonical: dict[str, WeightKey]
    """Every name a tensor goes by in the module, with the one key it has here: the first."""
    constants: dict[str, WeightKey] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        """Describe the tensors of a module, which must stay as it is while the description is used."""
        temporary = {
            f"{path}.{name}" if path else name
            for path, each in module.named_modules(remove_duplicate=False)
            for name in each._non_persistent_buffers_set
        }
        named: list[tuple[str, Tensor, Literal["parameter", "buffer", "constant"]]] = [
            (name, tensor, "parameter") for name, tensor in module.named_parameters(remove_duplicate=False)
        ]
        named += [
            (name, tensor, "constant" if name in temporary else "buffer")
            for name, tensor in module.named_buffers(remove_duplicate=False)
        ]
        first: dict[int, WeightKey] = {}
        entries: dict[WeightKey, _StateEntry] = {}
        canonical: dict[str, WeightKey] = {}
        for name, tensor, kind in named:
            key = first.setdefault(id(tensor), WeightKey(name))
            canonical[name] = key
            if key == name:
                entries[key] = _StateEntry(tensor, kind, ())
            else:
                old = entries[key]
                entries[key] = _StateEntry(old.tensor, old.kind, (*old.aliases, WeightKey(name)))
        return cls(entries, canonical)

    def add_constant(self, name: str, tensor: Tensor) -> WeightKey:
        """Keep a tensor that the model makes while it runs, and return its key. Equal tensors share one key."""
        if tensor.nbytes > LARGEST_CONSTANT_BYTES:
            raise GraphError(
                f"the model makes a constant of {tensor.nbytes:,} bytes on every call; register it as a buffer"
            )
        if tensor.is_meta:
            raise GraphError(
                "the model makes a constant tensor while on the meta device, where its values are lost; "
                "register it as a buffer, or capture on the CPU"
            )
        data = tensor_data(name, tensor)
        digest = hashlib.sha256(f"{data.dtype}{data.shape}".encode() + bytes(data.data)).hexdigest()[:12]
        key = WeightKey(f"constant.{digest}")
        self.entries.setdefault(key, _StateEntry(tensor.detach().clone(), "constant", ()))
        self.constants[name] = key
        return key

    def weight(self, key: WeightKey, *, mutated: bool) -> Weight:
        """Return a weight of the graph. A weight that the model writes to is a buffer, whatever the model declares."""
        entry = self.entries[key]
        return Weight(
            name=value_name(key),
            key=key,
            type=TensorType(dtype_name(entry.tensor.dtype), tuple(entry.tensor.shape)),
            kind="buffer" if mutated and entry.kind == "constant" else entry.kind,
            trainable=entry.kind == "parameter" and entry.tensor.requires_grad,
            aliases=entry.aliases,
        )

    def buffer_copies(self, prefix: str) -> dict[str, Tensor]:
        """Return a copy of each buffer by its key behind `prefix`, for a call that must not change the module."""
        return {
            f"{prefix}{key}": entry.tensor.detach().clone()
            for key, entry in self.entries.items()
            if entry.kind != "parameter" and key in self.canonical
        }

    def rank(self) -> Mapping[WeightKey, int]:
        """Return each key's place: parameters and buffers in the module's order, then constants by key."""
        own = [key for key in self.entries if not key.startswith("constant.")]
        return {key: place for place, key in enumerate([*own, *sorted(self.entries.keys() - set(own))])}

    def parameter_count(self) -> int:
        """Return the number of parameter elements, tied ones counted once."""
        return sum(entry.tensor.numel() for entry in self.entries.values() if entry.kind == "parameter")

    def on_meta(self, keys: Iterable[WeightKey]) -> bool:
        """Return whether any of the tensors has no data."""
        return any(self.entries[key].tensor.is_meta for key in keys)


def value_name(key: WeightKey) -> ValueName:
    """Return the provisional name under which a graph refers to a weight; it cannot clash with a node's."""
    return ValueName(f"weight:{key}")


def tensor_data(name: str, tensor: Tensor) -> TensorData:
    """Return a tensor as plain data, without a copy where it is contiguous on the CPU.

    Raises GraphError for a tensor on the meta device, which has no data.
    """
    if tensor.is_meta:
        raise GraphError(
            f"weight {name!r} is on the meta device and has no data; load or initialise the model on the CPU"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return TensorData(dtype_name(tensor.dtype), tuple(tensor.shape), data)
