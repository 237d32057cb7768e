"""The share of each microbatch in a step's loss.

Language models average the loss over the labels that count. So a microbatch's loss must be weighted by the number of
its counted labels. Otherwise the step's loss would depend on how its batch was cut into microbatches. A causal model
shifts its labels by one inside the graph, so the first label of a row does not count. The graph shows how many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusionai.errors import DataError
from fusionai.graph.model import OpDag, Ref, ValueName
from fusionai.graph.vocabulary import operator
from fusionai.tensor import TensorData
from fusionai.training.data.batches import Batch

IGNORED_LABEL = -100
"""Labels with this value do not count in a cross-entropy loss (torch's default `ignore_index`)."""


def loss_weights(graph: OpDag, batch: Sequence[Batch]) -> tuple[float, ...]:
    """Return the microbatches' shares, which add up to 1: by counted labels, or equal if labels are not classes.

    Raises DataError when no label of the whole batch counts.
    """
    labels = [item.name for item in graph.inputs if item.role == "labels" and item.type.dtype == "int64"]
    if not labels:
        return (1.0 / len(batch),) * len(batch)
    skipped = {name: _skipped(graph, name) for name in labels}
    counts = [sum(_counted(microbatch[name], skipped[name]) for name in labels) for microbatch in batch]
    if not sum(counts):
        raise DataError(f"every label of the batch is {IGNORED_LABEL}, so nothing counts in the loss")
    return tuple(count / sum(counts) for count in counts)


def _counted(labels: TensorData, skipped: int) -> int:
    """Return how many labels count, without the first `skipped` of each row."""
    found = np.frombuffer(labels.data, dtype="<i8").reshape(labels.shape)
    return int(np.count_nonzero((found[:, skipped:] if skipped else found) != IGNORED_LABEL))


def _skipped(graph: OpDag, labels: ValueName) -> int:
    """Return how many labels at the start of each row the graph cuts off before the loss."""
    derived = {labels}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, Ref) or source.name not in derived:
            continue
        if node.op == "aten.slice.Tensor":
            bound = operator(node.op).bind(node)
            start = bound["start"]
            if bound["dim"] in (1, -1) and isinstance(start, int) and start > 0:
                return start
        derived.update(node.outputs)
    return 0
