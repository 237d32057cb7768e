"""Checks a capture at sizes other than the traced ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from fusionai.errors import GraphError
from fusionai.graph.capture.call_state import unchanged
from fusionai.graph.capture.inputs import ExampleInput, resized
from fusionai.graph.capture.interpreter import interpret
from fusionai.graph.capture.state import ModuleState
from fusionai.graph.capture.tracing import MODULE_PREFIX, LossOf
from fusionai.graph.model import OpDag, ValueName

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
    """Raise GraphError unless graph and module compute the same loss at a second size, twice in a row.

    Both run in the module's own mode with the same random numbers, on copies of the tensors that they write to. The
    second call finds what the first one left, so a module that keeps something else than tensors differs there.
    """
    arguments = resized(tuple(inputs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unchanged(root):
        expected = _eager_losses(root, arguments, state)
        weights = {
            weight.name: state.entries[weight.key].tensor.detach()
            if weight.kind == "parameter"
            else state.entries[weight.key].tensor.detach().clone()
            for weight in graph.weights
        }
        try:
            found = [_graph_loss(graph, arguments, weights) for _ in expected]
        except (RuntimeError, ValueError) as error:
            raise _failed(graph, error) from None
    tolerance = max(
        (_RELATIVE_TOLERANCE.get(weight.type.dtype, 0.0) for weight in graph.weights),
        default=_RELATIVE_TOLERANCE["float32"],
    )
    for call, (ours, own) in enumerate(zip(found, expected, strict=True)):
        # Of few rows perhaps no label counts, and their mean is not a number.
        undefined = math.isnan(ours) and math.isnan(own)
        if not undefined and not math.isclose(ours, own, rel_tol=tolerance, abs_tol=tolerance):
            sizes = {symbol: arguments[source].shape[axis] for symbol, (source, axis) in graph.symbols.items()}
            what = f"the captured graph of {graph.name} computes the loss {ours:.8g} at sizes {sizes}"
            if call:
                raise GraphError(
                    f"{what} when it is called again, the module itself {own:.8g}: it keeps state between calls "
                    "outside of its buffers; keep it in a buffer (self.register_buffer), or compute it elsewhere"
                )
            raise GraphError(
                f"{what}, the module itself {own:.8g}: something in it depends on a size or a value that tracing took "
                "for a constant (a Python number made from data, a cache, or state kept between calls)"
            )


def _graph_loss(graph: OpDag, arguments: Mapping[str, Tensor], weights: Mapping[ValueName, Tensor]) -> float:
    torch.manual_seed(0)
    return float(interpret(graph, arguments, weights))


def _eager_losses(root: LossOf, arguments: Mapping[str, Tensor], state: ModuleState) -> list[float]:
    """Return the losses of two calls of a module, the second after what the first one did to it."""
    copies = state.buffer_copies(MODULE_PREFIX)
    losses = []
    try:
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(float(functional_call(root, copies, (dict(arguments),))))
        return losses
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
