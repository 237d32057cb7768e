"""The share of each microbatch in a step's loss.

A loss that averages over counted labels, as language models' do, must be weighted by how many each microbatch
has, or the step's loss would depend on how its batch was cut into microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusionai.errors import DataError
from fusionai.graph.model import OpDag
from fusionai.training.data.batches import Batch

IGNORED_LABEL = -100
"""Labels with this value do not count in a cross-entropy loss (torch's default `ignore_index`)."""


def loss_weights(graph: OpDag, batch: Sequence[Batch]) -> tuple[float, ...]:
    """Return each microbatch's share, adding up to 1: by counted labels, or equal where labels are no classes.

    Raises DataError when no label of the whole batch counts.
    """
    labels = [item.name for item in graph.inputs if item.role == "labels" and item.type.dtype == "int64"]
    if not labels:
        return (1.0 / len(batch),) * len(batch)
    counts = [
        sum(
            int(np.count_nonzero(np.frombuffer(microbatch[name].data, dtype="<i8") != IGNORED_LABEL)) for name in labels
        )
        for microbatch in batch
    ]
    if not sum(counts):
        raise DataError(f"every label of the batch is {IGNORED_LABEL}, so nothing counts in the loss")
    return tuple(count / sum(counts) for count in counts)
