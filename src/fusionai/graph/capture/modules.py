"""Capture: a torch module and its loss become an OP-DAG."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from fusionai.errors import GraphError
from fusionai.graph.capture.buffer_updates import updates_as_values
from fusionai.graph.capture.call_state import unchanged
from fusionai.graph.capture.canonical_graph import assemble, check_operators
from fusionai.graph.capture.capture_checks import MOST_PARAMETERS, check_shapes, check_values
from fusionai.graph.capture.captured import Captured
from fusionai.graph.capture.cleanup import normalise, remove_dead, simplify
from fusionai.graph.capture.inputs import ExampleInput, Role, example_inputs
from fusionai.graph.capture.kept_state import refuse_kept_state
from fusionai.graph.capture.listing import Listing
from fusionai.graph.capture.lowering import lower
from fusionai.graph.capture.mode_differences import may_differ
from fusionai.graph.capture.modes import evaluating, training
from fusionai.graph.capture.repeats import NotRepeatedError, instantiate, repeated_layers, shortened
from fusionai.graph.capture.state import ModuleState
from fusionai.graph.capture.tracing import MODULE_PREFIX, LossFunction, LossOf, trace
from fusionai.graph.capture.unseen import refuse_gradient_hooks, refuse_shared_memory, refusing_unseen
from fusionai.graph.evaluation import evaluated
from fusionai.graph.model import OpDag
from fusionai.graph.structure import structure
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
    evaluation: bool = True,
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

    With `evaluation`, the graph has an evaluation graph if the module computes something else in evaluation mode than
    in training mode, apart from operators that have an inference mode, such as dropout. Without, the graph is for
    training and planning only: its evaluation may be another than the module's.

    Raises GraphError when the module cannot become an OP-DAG; the text names the operator or input and the cause.
    """
    started_s = time.perf_counter()
    _refuse_uninitialised(module)
    inputs = example_inputs(_beside(module, example), roles, private, dynamic)
    root = LossOf(module, loss, inputs, fixed or {})
    refuse_gradient_hooks(module)
    refuse_shared_memory(module)
    title = name or type(module).__name__
    with training(module):
        state = ModuleState.of(module)
        if validate_values is None:
            validate_values = state.parameter_count() <= MOST_PARAMETERS
        with tracing(), refusing_unseen(module):
            listing = _operators(root, inputs, state, repeats=repeats)
        graph = assemble(title, listing, inputs, state)
        verify(graph)
        _check(graph, root, inputs, state, values=validate_values)
    arguments = {item.name: item.tensor for item in inputs}
    if evaluation and may_differ(module, root, arguments, tracing):
        with _named_evaluation(title), evaluating(module):
            with tracing(), refusing_unseen(module):
                other = _operators(root, inputs, state, repeats=repeats)
            alone = assemble(title, other, inputs, state)
            if not structure(graph, inference=True).computes(structure(alone, inference=False)):
                graph = assemble(title, listing, inputs, state, other)
                verify(graph)
                _check(alone, root, inputs, state, values=validate_values)
    log.info(
        "captured %s: %d operators%s, %d weights in %.1f s",
        graph.name, len(graph.nodes), " and others in evaluation" if graph.evaluation else "", len(graph.weights),
        time.perf_counter() - started_s,
    )  # fmt: skip
    return Captured(graph, {weight.key: state.entries[weight.key].tensor for weight in evaluated(graph).weights})


def _check(graph: OpDag, root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState, *, values: bool) -> None:
    """Check a graph against the module in its present mode, at a second size."""
    check_shapes(graph, inputs, state)
    if values and not state.on_meta(weight.key for weight in graph.weights):
        check_values(graph, root, inputs, state)


@contextmanager
def _named_evaluation(name: str) -> Iterator[None]:
    """Say in errors that they are about evaluation, and what to do."""
    try:
        yield
    except GraphError as error:
        raise GraphError(
            f"in evaluation mode {name} cannot be captured, though in training mode it can: {error}. Or train it "
            "without held-out data"
        ) from error


def _refuse_uninitialised(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise GraphError(
                f"{name!r} of {type(module).__name__} has no shape yet, because its module is initialised lazily; "
                "call the module once on an example first"
            )


def _beside(module: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the example on the module's device; a module on meta takes one without data."""
    device = next((tensor.device for tensor in module.parameters()), None)
    return {name: tensor.to(device) if device is not None else tensor for name, tensor in example.items()}


def _operators(root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState, *, repeats: bool) -> Listing:
    """Return the operators of a module, tracing repeated layers once where they allow it; buffers are values."""
    listing = _traced(root, inputs, state, repeats=repeats)
    updates_as_values(listing, state)
    check_operators(listing)
    return listing


def _traced(root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState, *, repeats: bool) -> Listing:
    if repeats:
        with unchanged(root):
            found = repeated_layers(root.module, lambda: _call(root, inputs, state), state)
        if found:
            try:
                with shortened(found):
                    listing = _trace(root, inputs, state)
                instantiate(listing, found, state)
                return listing
            except (NotRepeatedError, GraphError) as error:
                log.info("tracing every layer: %s", error)
    return _trace(root, inputs, state)


def _call(root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState) -> None:
    """Call a module on the example. Its buffers stay as they are, even where fake tensors do not keep writes away."""
    functional_call(root, state.buffer_copies(MODULE_PREFIX), ({item.name: item.tensor for item in inputs},))


def _trace(root: LossOf, inputs: Sequence[ExampleInput], state: ModuleState) -> Listing:
    """Trace the whole module, and return its operators, simplified."""
    with unchanged(root):
        program = trace(root, inputs)
    with unchanged(root):
        refuse_kept_state(root.changes.last, root.parts(), lambda: _call(root, inputs, state))
    listing = lower(program, inputs, state)
    normalise(listing)
    remove_dead(listing)
    check_operators(listing)
    simplify(listing, state)
    return listing
