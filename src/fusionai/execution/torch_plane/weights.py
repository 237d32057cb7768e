"""The weights that one program holds. A key is held once, even if several stages or names use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fusionai.errors import GraphError
from fusionai.execution.torch_plane.tensors import TORCH_DTYPES, from_data, storage_address
from fusionai.graph.model import SubDag, Weight, WeightKey
from fusionai.graph.sizes import concrete
from fusionai.tensor import TensorData


class Weights:
    """Parameters, buffers and constants of a program, on its device."""

    def __init__(self, subdags: Sequence[SubDag], device: torch.device) -> None:
        self._device = device
        self._declared: dict[WeightKey, Weight] = {}
        self._tensors: dict[WeightKey, Tensor] = {}
        self._addresses: set[int] = set()
        for subdag in subdags:
            for weight in subdag.weights:
                known = self._declared.setdefault(weight.key, weight)
                if (known.type, known.kind, known.trainable) != (weight.type, weight.kind, weight.trainable):
                    raise GraphError(f"weight {weight.key!r} is declared in two ways in the stages of one job")

    @property
    def tensors(self) -> Mapping[WeightKey, Tensor]:
        """The weights loaded so far; a trainable one requires gradients."""
        return self._tensors

    def share_memory_with(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight or a view of one."""
        return storage_address(tensor) in self._addresses

    def keys(self) -> tuple[WeightKey, ...]:
        """Return every key held, loaded or not."""
        return tuple(self._declared)

    def missing(self) -> tuple[WeightKey, ...]:
        """Return the keys not loaded yet."""
        return tuple(key for key in self._declared if key not in self._tensors)

    def trainable(self) -> Iterable[tuple[WeightKey, Tensor]]:
        """Yield the weights that training changes."""
        return ((key, tensor) for key, tensor in self._tensors.items() if tensor.requires_grad)

    def shape(self, key: WeightKey) -> tuple[int, ...]:
        """Return the declared shape of a weight. Raises GraphError when it is not held here."""
        return concrete(self._declaration(key).type, {})

    def get(self, key: WeightKey) -> Tensor:
        """Return a weight. Raises GraphError when it is not held here or not loaded yet."""
        self._declaration(key)
        if key not in self._tensors:
            raise GraphError(f"weight {key!r} is not loaded yet")
        return self._tensors[key]

    def load(self, key: WeightKey, data: TensorData) -> None:
        """Set a weight. A weight that is loaded already is overwritten in place, so that no second copy exists."""
        self.check(key, data)
        with torch.no_grad():
            if key in self._tensors:
                self._tensors[key].copy_(from_data(data, self._device))
                return
            tensor = torch.empty(data.shape, dtype=TORCH_DTYPES[data.dtype], device=self._device)
            tensor.copy_(from_data(data, torch.device("cpu")))
        self._addresses.add(storage_address(tensor))
        trainable = self._declared[key].trainable
        self._tensors[key] = nn.Parameter(tensor, requires_grad=True) if trainable else tensor

    def check(self, key: WeightKey, data: TensorData) -> None:
        """Raise GraphError when `data` is not of the declared dtype and shape of a weight held here."""
        declared = self._declaration(key).type
        found, wanted = (data.dtype, data.shape), (declared.dtype, concrete(declared, {}))
        if found != wanted:
            raise GraphError(
                f"weight {key!r} is {wanted[0]} of shape {list(wanted[1])}, "
                f"but got {found[0]} of shape {list(found[1])}"
            )

    def clear(self) -> None:
        """Forget every tensor."""
        self._tensors.clear()
        self._addresses.clear()

    def _declaration(self, key: WeightKey) -> Weight:
        if key not in self._declared:
            raise GraphError(f"weight {key!r} is not held here; held: {_some(self._declared)}")
        return self._declared[key]


def _some(names: Iterable[str]) -> str:
    """List the first few names."""
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"
