"""Checks a capture at sizes other than the traced ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from fusionai.errors import GraphError
from fusionai.graph.capture.inputs import ExampleInput, resized
from fusionai.graph.capture.interpreter import interpret
from fusionai.graph.capture.state import ModuleState
from fusionai.graph.capture.tracing import MODULE_PREFIX, LossOf
from fusionai.graph.model import OpDag

MOST_PARAMETERS = 50_000_000
"""Most parameters of a module whose loss is compared by default. Shapes are checked for modules of any size."""

_RELATIVE_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative difference of the losses, by dtype of the least precise parameter. Another order of additions stays
far below it; a wrong graph does not."""


def check_shapes(graph: OpDag, inputs: Sequence[ExampleInput], state: ModuleState) -> None:
    """Raise GraphError unless every shape of the graph holds at a second size; nothing is computed."""
    arguments = {name: tensor.to("meta") for name, tensor in resized(tuple(inputs)).items()}
    weights = {weight.name: state.entries[weight.key].tensor.detach().to("meta") for weight in graph.weights}
    try:
        interpret(graph, arguments, weights)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise _failed(graph, error) from None


def check_values(graph: OpDag, root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState) -> None:
    """Raise GraphError unless graph and module compute the same loss at a second size.

    Both run in the module's own mode with the same random numbers, on copies of the tensors that they write to.
    """
    arguments = resized(tuple(inputs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = _eager_loss(root, arguments, state)
        torch.manual_seed(0)
        weights = {
            weight.name: state.entries[weight.key].tensor.detach()
            if weight.kind == "parameter"
            else state.entries[weight.key].tensor.detach().clone()
            for weight in graph.weights
        }
        try:
            found = float(interpret(graph, arguments, weights))
        except (RuntimeError, ValueError) as error:
            raise _failed(graph, error) from None
    tolerance = max(
        (_RELATIVE_TOLERANCE.get(weight.type.dtype, 0.0) for weight in graph.weights),
        default=_RELATIVE_TOLERANCE["float32"],
    )
    # Of few rows perhaps no label counts, and their mean is not a number.
    undefined = math.isnan(found) and math.isnan(expected)
    if not undefined and not math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance):
        sizes = {symbol: arguments[source].shape[axis] for symbol, (source, axis) in graph.symbols.items()}
        raise GraphError(
            f"the captured graph of {graph.name} computes the loss {found:.8g} at sizes {sizes}, the module itself "
            f"{expected:.8g}: something in it depends on a size or a value that tracing took for a constant "
            "(a Python number made from data, a cache, or state kept between calls)"
        )


def _eager_loss(root: LossOf, arguments: Mapping[str, Tensor], state: ModuleState) -> float:
    copies = {
        f"{MODULE_PREFIX}{key}": entry.tensor.detach().clone()
        for key, entry in state.entries.items()
        if entry.kind != "parameter" and key in state.canonical
    }
    try:
        return float(functional_call(root, copies, (dict(arguments),)))
    except (RuntimeError, ValueError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        sizes = {name: list(tensor.shape) for name, tensor in arguments.items()}
        raise GraphError(
            f"the module fails when called again, at another size than the example's ({sizes}): {first}; make it "
            "work for every size without keeping tensors between calls, or leave the axis out of dynamic={...}"
        ) from None


def _failed(graph: OpDag, error: Exception) -> GraphError:
    first = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return GraphError(f"the captured graph of {graph.name} does not work at a second size: {first}")
