"""The data of a job as its driver reads it: microbatches by step and index, and held-out microbatches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from fusionai.errors import DataError
from fusionai.tensor import ITEM_BYTES, DType, TensorData

Batch = Mapping[str, TensorData]
"""One microbatch: tensors by input name, for every input of the graph but positions, which stages derive."""

ArrayFunction = Callable[[int, int], Mapping[str, Any]]
"""A user's data: from step and index to torch tensors or numpy arrays by input name."""


class Batches(Protocol):
    """A job's data. Both methods block. They may be called from any thread, one call at a time."""

    def microbatch(self, step: int, index: int) -> Batch:
        """Return a microbatch. The same step and index always give the same content."""

    def heldout(self) -> Sequence[Batch]:
        """Return the microbatches to evaluate on. There are none when nothing is held out."""


class TensorBatches:
    """Microbatches from a user's function of step and index, and held-out ones from a function of the index.

    The functions must be pure: a step that is run again must see the same content.
    """

    def __init__(
        self,
        function: ArrayFunction,
        heldout: Sequence[Mapping[str, Any]] | None = None,
        *,
        names: Collection[str] | None = None,
    ) -> None:
        """`heldout` are the microbatches to evaluate on; they are converted when asked for.

        `names` are the only inputs that there may be, where they are known: one that the model was captured without
        would be left out without a word.
        """
        self._function = function
        self._heldout = tuple(heldout or ())
        self._names = None if names is None else frozenset(names)

    def microbatch(self, step: int, index: int) -> Batch:
        """Call the function and convert its result. Raises DataError naming the input that is no tensor, or unknown."""
        return self._checked(self._function(step, index), f"microbatch {index} of step {step}")

    def heldout(self) -> Sequence[Batch]:
        """Convert the held-out microbatches. Raises DataError as `microbatch` does."""
        return [self._checked(each, f"held-out microbatch {index}") for index, each in enumerate(self._heldout)]

    def _checked(self, found: object, place: str) -> Batch:
        batch = _converted(found, place)
        unknown = sorted(batch.keys() - self._names) if self._names is not None else []
        if unknown:
            raise DataError(
                f"{place} has the input {unknown[0]!r}, which microbatch 0 of step 0 does not have; give equal inputs "
                "every time, so that the model is captured with all of them"
            )
        return batch


def _converted(found: object, place: str) -> Batch:
    if not isinstance(found, Mapping) or not found:
        raise DataError(
            f"{place} must be a dictionary from the names of the model's inputs to tensors, got {_kind(found)}"
        )
    return {str(name): tensor_data(value, f"input {name!r} of {place}") for name, value in found.items()}


def tensor_data(value: Any, name: str) -> TensorData:
    """Copy a torch tensor or numpy array into plain data.

    torch is not imported for it: anything with `detach` is taken for a tensor. Raises DataError when the value
    is neither, or has a dtype that FusionAI does not know; `name` says in the text which value it is.
    """
    if hasattr(value, "detach"):
        try:
            value = value.detach().cpu().contiguous().numpy()
        except (TypeError, RuntimeError) as error:
            raise DataError(f"{name}: a {value.dtype} tensor cannot be read: {error}") from error
    if not isinstance(value, np.ndarray | np.generic):
        raise DataError(f"{name} must be a torch tensor or a numpy array, got {_kind(value)}")
    array = np.asarray(value)
    if array.dtype.name not in ITEM_BYTES:
        raise DataError(f"{name} has dtype {array.dtype.name}; convert it to one of {', '.join(ITEM_BYTES)}")
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    # Copied, because a user's function may fill the same array again for the next microbatch.
    return TensorData(cast(DType, array.dtype.name), array.shape, little.tobytes())


def _kind(value: object) -> str:
    return "an empty dictionary" if isinstance(value, Mapping) and not value else type(value).__name__
