"""The result of a capture: an OP-DAG and its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fusionai.errors import GraphError
from fusionai.graph.capture.state import tensor_data
from fusionai.graph.model import OpDag, WeightKey
from fusionai.tensor import TensorData


@dataclass(frozen=True)
class Captured:
    """An OP-DAG, and the weights that its training starts from."""

    graph: OpDag
    _tensors: dict[WeightKey, Tensor] = field(repr=False)

    def read(self, name: str) -> TensorData:
        """Return the weight of a key, sharing the captured module's memory where that is possible.

        Raises GraphError for an unknown key, and for a module on the meta device, which has no values.
        """
        tensor = self._tensors.get(WeightKey(name))
        if tensor is None:
            raise GraphError(f"the captured model has no weight {name!r}; its graph has {len(self._tensors)} weights")
        return tensor_data(name, tensor)
