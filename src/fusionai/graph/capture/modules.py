"""Capture: a torch module and its loss become an OP-DAG."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from fusionai.errors import GraphError
from fusionai.graph.capture.canonical_graph import assemble, check_operators
from fusionai.graph.capture.capture_checks import MOST_PARAMETERS, check_shapes, check_values
from fusionai.graph.capture.captured import Captured
from fusionai.graph.capture.cleanup import normalise, remove_dead, simplify
from fusionai.graph.capture.inputs import ExampleInput, Role, example_inputs
from fusionai.graph.capture.listing import Listing
from fusionai.graph.capture.lowering import lower
from fusionai.graph.capture.repeats import NotRepeatedError, instantiate, repeated_layers, shortened
from fusionai.graph.capture.state import ModuleState
from fusionai.graph.capture.tracing import LossFunction, LossOf, trace, training
from fusionai.graph.capture.unseen import refuse_gradient_hooks, refusing_unseen
from fusionai.graph.verify import verify

log = logging.getLogger(__name__)


def capture(
    module: nn.Module,
    example: Mapping[str, Tensor],
    *,
    loss: LossFunction | None = None,
    roles: Mapping[str, Role] | None = None,
    private: Collection[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    name: str = "",
    fixed: Mapping[str, object] | None = None,
    repeats: bool = True,
    validate_values: bool | None = None,
    tracing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Captured:
    """Trace a module with its loss into an OP-DAG. Nothing of the module is computed or changed.

    `example` maps names of the module's arguments to tensors: their dtypes and ranks count, and their sizes on
    axes that are not dynamic. The module returns a scalar loss, `(loss, ...)`, or something with a `loss`; or
    `loss(output, labels)` computes it, and inputs of role "labels" then go to it alone. `fixed` holds further
    arguments that are no tensors. A module on the meta device is captured without any data.

    `dynamic` names, for each input, the axes that may change size. Axes with one name always have one size. The
    default is axis 0 ("batch") of every tensor, and axis 1 ("length") of tokens and of tensors of the same shape.
    `private` lists the inputs that must not leave the owner: by default all but positions.

    With `repeats`, equal blocks of a long list of layers are traced once. Every capture is checked at a second
    size, and with `validate_values` (by default up to 50 million parameters) the loss computed by the graph is
    compared to the module's own there. `tracing` is entered while the module is traced, and only then.

    Raises GraphError when the module cannot become an OP-DAG; the text names the operator or input and the cause.
    """
    started_s = time.perf_counter()
    inputs = example_inputs(_beside(module, example), roles, private, dynamic)
    root = LossOf(module, loss, inputs, fixed or {})
    refuse_gradient_hooks(module)
    with training(module):
        state = ModuleState.of(module)
        with tracing(), refusing_unseen(type(module).__name__):
            listing = _operators(root, inputs, state, repeats=repeats)
        graph = assemble(name or type(module).__name__, listing, inputs, state)
        verify(graph)
        check_shapes(graph, inputs, state)
        if validate_values is None:
            validate_values = state.parameter_count() <= MOST_PARAMETERS
        if validate_values and not state.on_meta(weight.key for weight in graph.weights):
            check_values(graph, root, inputs, state)
    log.info(
        "captured %s: %d operators, %d weights in %.1f s",
        graph.name, len(graph.nodes), len(graph.weights), time.perf_counter() - started_s,
    )  # fmt: skip
    return Captured(graph, {weight.key: state.entries[weight.key].tensor for weight in graph.weights})


def _beside(module: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the example on the module's device; a module on meta takes one without data."""
    device = next((tensor.device for tensor in module.parameters()), None)
    return {name: tensor.to(device) if device is not None else tensor for name, tensor in example.items()}


def _operators(root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState, *, repeats: bool) -> Listing:
    """Return the operators of a module, tracing repeated layers once where they allow it."""
    if repeats:
        arguments = {item.name: item.tensor for item in inputs}
        found = repeated_layers(root.module, lambda: root(arguments), state)
        if found:
            try:
                with shortened(found):
                    listing = _trace(root, inputs, state)
                instantiate(listing, found, state)
                return listing
            except (NotRepeatedError, GraphError) as error:
                log.info("tracing every layer: %s", error)
    return _trace(root, inputs, state)


def _trace(root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState) -> Listing:
    """Trace the whole module, and return its operators, simplified."""
    listing = lower(trace(root, inputs), inputs, state)
    normalise(listing)
    remove_dead(listing)
    check_operators(listing)
    simplify(listing, state)
    return listing
