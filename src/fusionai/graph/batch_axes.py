"""Which sizes of an OP-DAG grow with the batch. The samples of a batch lie along axis 0 of every input."""

from __future__ import annotations

from collections.abc import Iterable

from fusionai.errors import GraphError
from fusionai.graph.model import Argument, Dim, Node, OpDag, Size, TensorType
from fusionai.graph.sizes import evaluate, symbols_of

_BATCH_SIZES = (2, 3, 5)
_OTHER_SIZE = 840
"""For all other symbols: a number that many numbers divide, and whose products stay within the bound of sizes."""


class BatchAxes:
    """The axes of samples in the shapes of one graph."""

    def __init__(self, graph: OpDag) -> None:
        self.symbols = frozenset(
            size
            for item in graph.inputs
            for size in item.type.shape[:1]
            if isinstance(size, str) and size in graph.symbols
        )
        """Symbols of the axis of samples."""
        self._others = [symbol for symbol in graph.symbols if symbol not in self.symbols]
        self._known: dict[Dim, bool | None] = {}

    def grows(self, size: Dim) -> bool | None:
        """Return whether a size grows in proportion to the batch; None where it grows in another way."""
        if isinstance(size, int):
            return False
        if size not in self._known:
            self._known[size] = self._proportional(size) if symbols_of(size) & self.symbols else False
        return self._known[size]

    def of(self, type: TensorType) -> int | None:
        """Return the number of axes that grow with the batch: 0 or 1. None where samples are not apart any more."""
        grown = [self.grows(size) for size in type.shape]
        return None if None in grown or grown.count(True) > 1 else grown.count(True)

    def alike(self, types: Iterable[TensorType]) -> bool:
        """Return whether the axis of samples is the same one in all tensors when they are broadcast."""
        places = {
            len(type.shape) - place for type in types for place, size in enumerate(type.shape) if self.grows(size)
        }
        return len(places) <= 1

    def works_along(self, type: TensorType, dims: Argument) -> bool:
        """Return whether axes of a tensor, given as for torch, include its axis of samples. No axes stand for all."""
        axes = dims if isinstance(dims, tuple) else (dims,)
        rank = len(type.shape)
        return any(
            self.grows(size) and (not axes or place in axes or place - rank in axes)
            for place, size in enumerate(type.shape)
        )

    def read_as_numbers(self, node: Node) -> bool:
        """Return whether an argument of a call is a number that depends on the size of the batch."""
        return any(
            isinstance(atom, Size) and not symbols_of(atom.expression).isdisjoint(self.symbols)
            for argument in (*node.args, *node.kwargs.values())
            for atom in (argument if isinstance(argument, tuple) else (argument,))
        )

    def _proportional(self, size: str) -> bool | None:
        def at(batch: int) -> int:
            return evaluate(size, dict.fromkeys(self.symbols, batch) | dict.fromkeys(self._others, _OTHER_SIZE))

        try:
            linear = all(at(times * batch) == times * at(batch) for batch in _BATCH_SIZES for times in (2, 3))
        except GraphError:
            return None
        return True if linear else None
