"""A machine of a job as its driver sees it, and the sizes of what it is fed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusionai.errors import DataError
from fusionai.graph.model import OpDag, Sizes, SubDag, WeightKey
from fusionai.graph.sizes import concrete
from fusionai.network.identity import PeerId
from fusionai.tensor import TensorData
from fusionai.training.data.batches import Batch


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine of the job as its driver sees it."""

    peer: PeerId
    name: str
    subdags: tuple[SubDag, ...]

    @property
    def keys(self) -> tuple[WeightKey, ...]:
        """Keys of the weights it holds, each once."""
        return tuple(dict.fromkeys(weight.key for subdag in self.subdags for weight in subdag.weights))

    @property
    def holding(self) -> str:
        """What it holds, for people: "stage 1, 2"."""
        return "stage " + ", ".join(str(subdag.index) for subdag in self.subdags)


def sizes_of(graph: OpDag, microbatch: Batch) -> Sizes:
    """Return the numbers of a graph's symbols for a microbatch.

    Raises DataError when it lacks an input, or one has another dtype or shape than the graph takes; and when it has
    positions that do not count from 0, because stages make those themselves.
    """
    inputs = [item for item in graph.inputs if item.role != "positions"]
    for item in inputs:
        if item.name not in microbatch:
            raise DataError(f"a microbatch lacks the input {item.name!r}; it has {sorted(microbatch)}")
    sizes: Sizes = {
        symbol: microbatch[name].shape[axis]
        for symbol, (name, axis) in graph.symbols.items()
        if name in microbatch and axis < len(microbatch[name].shape)
    }
    for item in inputs:
        found = microbatch[item.name]
        if found.dtype != item.type.dtype or found.shape != concrete(item.type, sizes):
            raise DataError(
                f"input {item.name!r} must be {item.type.dtype}{list(item.type.shape)} with {sizes}, "
                f"but is {found.dtype}{list(found.shape)}"
            )
    for item in graph.inputs:
        if item.role == "positions" and item.name in microbatch:
            _refuse_uncounted(item.name, microbatch[item.name])
    return sizes


def _refuse_uncounted(name: str, given: TensorData) -> None:
    """Raise DataError unless every row of a tensor is 0..T-1."""
    positions = np.frombuffer(given.data, dtype=given.dtype).reshape(given.shape)
    if not given.shape or not np.array_equal(positions, np.broadcast_to(np.arange(given.shape[-1]), given.shape)):
        raise DataError(
            f"input {name!r} has the role 'positions', which stages count as 0..T-1 themselves, but a microbatch has "
            'other values; give it the role "data", so that your values are fed'
        )
