"""Resuming from a checkpoint: training starts from its weights and optimizer state."""

from __future__ import annotations

from pathlib import Path

from fusionai.errors import CheckpointError
from fusionai.graph.evaluation import evaluated
from fusionai.graph.model import OpDag
from fusionai.tensor import TensorData
from fusionai.training.checkpoint import CheckpointReader, latest
from fusionai.training.weight_orders import WeightSource


class CheckpointWeights:
    """Tensors of a checkpoint. A checkpoint holds no constants, so they come from the captured model."""

    def __init__(self, reader: CheckpointReader, captured: WeightSource) -> None:
        self._reader = reader
        self._captured = captured

    def read(self, name: str) -> TensorData:
        """Return a weight by key, or an optimizer state by "<key>::<state>"."""
        if name in self._reader:
            return self._reader.read(name)
        if "::" in name:
            raise CheckpointError(f"{self._reader.folder} holds no optimizer state {name!r}; it cannot be resumed")
        return self._captured.read(name)


def newest_checkpoint(run: Path) -> Path:
    """Return the newest complete checkpoint of a run folder. Raises CheckpointError when there is none."""
    found = latest(run)
    if found is None:
        raise CheckpointError(f"{run} holds no complete checkpoint to resume from")
    return found


def check_same_graph(graph: OpDag, reader: CheckpointReader) -> None:
    """Raise CheckpointError naming the first weight that a checkpoint lacks or has in another shape."""
    for weight in evaluated(graph).weights:
        if weight.kind == "constant":
            continue
        if weight.key not in reader:
            raise CheckpointError(f"{reader.folder} lacks the weight {weight.key!r}: it is of another model")
        spec = reader.spec(weight.key)
        if tuple(spec.shape) != tuple(weight.type.shape):
            raise CheckpointError(
                f"weight {weight.key!r} has shape {list(spec.shape)} in {reader.folder}, but "
                f"{list(weight.type.shape)} in the model"
            )
