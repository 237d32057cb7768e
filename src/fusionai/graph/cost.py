"""Costs of operators and stages: FLOPs, bytes moved, and memory. They are counted; seconds come from profiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fusionai.errors import GraphError
from fusionai.graph.activation_memory import stage_memory
from fusionai.graph.bound_call import BoundCall
from fusionai.graph.calls import StageCalls, total_bytes
from fusionai.graph.model import Sizes, SubDag, ValueName
from fusionai.graph.operators.schema import OpClass
from fusionai.graph.sizes import type_bytes
from fusionai.graph.vocabulary import FLOP_CLASSES


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One operator call on one microbatch."""

    op_class: OpClass
    forward_flops: int
    backward_flops: int
    """FLOPs of forward and of backward; 0 for op classes whose time is memory traffic."""
    forward_bytes: int
    backward_bytes: int
    """Bytes read plus written, in forward and in backward; 0 for op classes counted in FLOPs, and for views."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """Cost of one sub-DAG. Figures are for one microbatch unless they say otherwise."""

    forward_flops: dict[str, int]
    backward_flops: dict[str, int]
    """FLOPs of forward and of backward, by op class."""
    forward_bytes: int
    backward_bytes: int
    """Bytes moved by operators that are not counted in FLOPs; in backward also by adding up gradients of weights."""
    operators: int
    """Number of operator calls in a forward pass."""
    backward_operators: int
    trainable_bytes: int
    """Bytes of trainable weights; a tied weight counts once."""
    other_bytes: int
    """Bytes of buffers, constants and frozen weights."""
    saved_bytes: int
    """Bytes kept for a microbatch between its forward and its backward."""
    fixed_bytes: int
    """Bytes of values that are computed once and shared by all microbatches: rotary tables, masks."""
    transient_bytes: int
    """Largest working set that forward or backward of one microbatch needs on top of the kept bytes."""
    receive_bytes: int
    """Bytes of the boundary tensors that a forward receives; a value that several stages send counts once."""
    deferred_flops: int = 0
    """Backward FLOPs of matrix products that may be computed after the boundary gradients have been sent."""
    inputs: dict[str, int] = field(default_factory=dict)
    """Bytes of each graph input that the stage reads."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything held in the model's state."""
        return self.trainable_bytes + self.other_bytes

    def training_bytes(self, in_flight: int, optimizer_states: int) -> int:
        """Return the memory that training takes with `in_flight` microbatches between forward and backward.

        It is the sum of weights, their gradients, `optimizer_states` tensors of the same size, the kept bytes of each
        microbatch, and the largest working set. The framework's own memory is not counted.
        """
        copies = 2 + optimizer_states
        state_bytes = copies * self.trainable_bytes + self.other_bytes + self.fixed_bytes
        return state_bytes + in_flight * self.saved_bytes + self.transient_bytes


def stage_cost(subdag: SubDag, sizes: Sizes) -> StageCost:
    """Return the cost of a sub-DAG at the given sizes.

    Raises GraphError when `sizes` lacks a symbol, a tensor exceeds the limits of `graph.sizes`, or the declared types
    do not fit the operators.
    """
    with types_fit(subdag):
        return cost_of_calls(StageCalls(subdag, sizes))


@contextmanager
def types_fit(subdag: SubDag) -> Iterator[None]:
    """Turn Python errors of types that contradict the operators into GraphError: a peer may have declared them."""
    try:
        yield
    except (ArithmeticError, LookupError, ValueError, TypeError) as error:
        raise GraphError(
            f"the declared shapes of stage {subdag.index} do not fit its operators ({type(error).__name__}: {error}); "
            "capture the model again"
        ) from error


def costs_of_nodes(stage: StageCalls) -> list[NodeCost]:
    """Return the cost of each node of a sub-DAG, in the nodes' order. A node that is computed only once costs nothing.

    Call it within `types_fit`.
    """
    found = {bound.node.name: _node_cost(stage, bound) for bound in stage.calls}
    idle = NodeCost("metadata", 0, 0, 0, 0)
    return [found.get(node.name, idle) for node in stage.subdag.nodes]


def cost_of_calls(stage: StageCalls) -> StageCost:
    """Return the cost of a sub-DAG whose calls are bound. Call it within `types_fit`."""
    subdag = stage.subdag
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    forward_bytes = backward_bytes = 0
    costs = {bound.node.name: _node_cost(stage, bound) for bound in stage.calls}
    for cost in costs.values():
        if cost.forward_flops:
            forward[cost.op_class] += cost.forward_flops
            backward[cost.op_class] += cost.backward_flops
        forward_bytes += cost.forward_bytes
        backward_bytes += cost.backward_bytes
    memory = stage_memory(stage)
    # The product that gives a weight's gradient takes as many FLOPs as the forward product.
    deferred_flops = sum(costs[name].forward_flops for name in memory.deferred)
    weights = {weight.key: weight for weight in subdag.weights}.values()
    trainable = sum(type_bytes(weight.type, {}) for weight in weights if weight.trainable)
    other = sum(type_bytes(weight.type, {}) for weight in weights if not weight.trainable)
    return StageCost(
        forward_flops=dict(forward),
        backward_flops=dict(backward),
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
        operators=len(stage.calls),
        backward_operators=sum(stage.is_graded(bound) for bound in stage.calls),
        trainable_bytes=trainable,
        other_bytes=other,
        saved_bytes=memory.saved_bytes,
        fixed_bytes=memory.fixed_bytes,
        transient_bytes=memory.transient_bytes,
        receive_bytes=total_bytes(stage.nbytes, {each.value for each in subdag.receives}),
        deferred_flops=deferred_flops,
        inputs={item.name: stage.nbytes[item.name] for item in subdag.inputs},
    )


def _node_cost(stage: StageCalls, bound: BoundCall) -> NodeCost:
    traits, call = bound.traits, bound.call
    forward, backward = traits.flops(call) if traits.flops is not None else (0, 0)
    moved = back_moved = 0
    if traits.op_class not in FLOP_CLASSES and not stage.is_alias(bound):
        made = total_bytes(stage.nbytes, bound.node.outputs)
        moved = made + sum(_read_bytes(stage, bound, value) for value in bound.reads)
        graded = (value for value in bound.reads if value in stage.graded)
        back_moved = moved + total_bytes(stage.nbytes, graded)
    # Adding a weight's gradient to the sum moves four times its bytes: the gradient is written and read again, and the
    # sum is read and written.
    trained = (value for value in bound.reads if value in stage.weights and value in stage.graded)
    back_moved += 4 * total_bytes(stage.nbytes, trained)
    if not stage.is_graded(bound):
        backward = back_moved = 0
    return NodeCost(traits.op_class, forward, backward, moved, back_moved)


def _read_bytes(stage: StageCalls, bound: BoundCall, value: ValueName) -> int:
    """Return the bytes read from an argument. A lookup in a table reads no more than its result holds."""
    size = stage.nbytes[value]
    if bound.traits.op_class == "gather":
        return min(size, total_bytes(stage.nbytes, bound.node.outputs))
    return size
