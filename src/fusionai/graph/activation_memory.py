"""The memory of a stage's activations and gradients, found by going through a microbatch call by call.

Autograd keeps what `Operator.saves` names from forward to backward; a tensor kept twice, or through views, counts once.
Boundary tensors are kept too: the received ones are the leaves that gradients are for, the sent ones the roots.

Gradients of some weights are computed after the boundary gradients are sent (`dependencies.deferrable`). Their inputs
stay alive until then, up to `MOST_DEFERRED_BYTES`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fusionai.graph.bound_call import BoundCall
from fusionai.graph.calls import StageCalls, total_bytes
from fusionai.graph.dependencies import deferrable
from fusionai.graph.model import ValueName

MOST_DEFERRED_BYTES = 256 << 20
"""Most bytes of inputs and gradients of linear calls that are kept past their turn in backward, so that boundary
gradients can be sent earlier. It bounds what that costs in memory. With a smaller value more products are computed
before the send; with a larger one a stage with wide layers may need memory that the plan would give to microbatches."""


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """Bytes that one stage needs at given sizes, besides weights and their gradients."""

    saved_bytes: int
    """Bytes kept for a microbatch from its forward to its backward."""
    fixed_bytes: int
    """Bytes of rotary tables, masks and similar values: computed once, shared by all microbatches."""
    transient_bytes: int
    """Most bytes that forward or backward of one microbatch holds beyond the kept and fixed ones."""
    deferred: frozenset[str]
    """Names of the nodes whose weight's gradient is computed after the boundary gradients are sent."""


def stage_memory(stage: StageCalls) -> ActivationMemory:
    """Return the bytes that a stage's activations and gradients take."""
    saving = [_saved(stage, bound) for bound in stage.calls]
    fixed = {stage.owner(value) for bound in stage.fixed_calls for value in bound.node.outputs}
    fixed |= {item.name for item in stage.subdag.inputs if item.role == "positions"}
    used = {stage.owner(value) for bound in stage.calls for value in bound.reads}
    held = stage.weights | fixed
    boundary = {stage.owner(each.value) for each in (*stage.subdag.receives, *stage.subdag.sends)} - held
    kept = set(boundary).union(*saving) - held
    extra = [_extra(stage, bound) for bound in stage.calls]
    saved_bytes = total_bytes(stage.nbytes, kept) + sum(extra)
    forward = _forward_peak(stage, kept, extra, held)
    backward, deferred = _backward_peak(stage, [each - held for each in saving], extra, boundary, saved_bytes)
    return ActivationMemory(
        saved_bytes=saved_bytes,
        fixed_bytes=total_bytes(stage.nbytes, fixed & used),
        transient_bytes=max(0, forward - saved_bytes, backward - saved_bytes),
        deferred=deferred,
    )


def _saved(stage: StageCalls, bound: BoundCall) -> set[ValueName]:
    """Return the values that autograd keeps for a call's backward."""
    found: set[ValueName] = set()
    if not stage.is_graded(bound):
        return found
    for rule in bound.traits.saves:
        what, _, condition = rule.partition(" if ")
        if condition and not any(value in stage.graded for value in bound.values(condition)):
            continue
        if what.startswith("output"):
            found.add(bound.node.outputs[int(what.removeprefix("output") or 0)])
        else:
            found.update(bound.values(what))
    return {stage.owner(value) for value in found}


def kept_bytes(stage: StageCalls, bound: BoundCall) -> int:
    """Return the bytes that autograd keeps for one call, weights included."""
    return total_bytes(stage.nbytes, _saved(stage, bound)) + _extra(stage, bound)


def _extra(stage: StageCalls, bound: BoundCall) -> int:
    if bound.traits.extra is None or not stage.is_graded(bound):
        return 0
    return bound.traits.extra(bound.call)


def _forward_peak(stage: StageCalls, kept: set[ValueName], extra: list[int], held: Iterable[ValueName]) -> int:
    """Return the most bytes that are alive at one time in forward, the kept ones included."""
    last: dict[ValueName, int] = {}
    for place, bound in enumerate(stage.calls):
        for value in (*bound.reads, *bound.node.outputs):
            last[stage.owner(value)] = place
    ending: dict[int, list[ValueName]] = {}
    made = {output for bound in stage.calls for output in bound.node.outputs}
    for value, place in last.items():
        if value in made and value not in kept:
            ending.setdefault(place, []).append(value)
    total = peak = total_bytes(stage.nbytes, kept - made)
    for place, bound in enumerate(stage.calls):
        total += total_bytes(stage.nbytes, (each for each in bound.node.outputs if stage.root[each] == each))
        total += extra[place]
        workspace = bound.traits.workspace
        peak = max(peak, total + (workspace(bound.call) if workspace is not None else 0))
        total -= total_bytes(stage.nbytes, ending.get(place, ()))
    return peak


class _Gradients:
    """The gradients alive in backward. Several values may share one gradient, as the operands of an addition do."""

    def __init__(self, stage: StageCalls) -> None:
        self._nbytes = stage.nbytes
        self._fresh = itertools.count()
        self._buffer: dict[ValueName, int] = {}
        self._bytes: dict[int, int] = {}
        self._owners: dict[int, int] = {}
        self.total_bytes = 0

    def add(self, value: ValueName, shared_with: ValueName | None = None) -> None:
        """Add one more part of a value's gradient: a new tensor, or another value's gradient."""
        old = self._buffer.get(value)
        if shared_with is not None and shared_with in self._buffer:
            new = self._buffer[shared_with]
            self._owners[new] += 1
        else:
            new = self._allocate(self._nbytes[value])
        if old is not None:
            # torch adds in place when nobody else holds the sum so far.
            if self._owners[old] == 1:
                self._release(new)
                return
            total = self._allocate(self._nbytes[value])
            self._release(new)
            self._release(old)
            new = total
        self._buffer[value] = new

    def start(self, value: ValueName) -> None:
        """Begin with a gradient that somebody else holds too, so that nothing is added to it in place."""
        buffer = self._allocate(0)
        self._owners[buffer] += 1
        self._buffer[value] = buffer

    def hold(self, value: ValueName) -> None:
        """Keep the gradient of a value alive to the end."""
        self._owners[self._buffer[value]] += 1

    def drop(self, value: ValueName) -> None:
        """Forget the gradient of a value, if there is one."""
        buffer = self._buffer.pop(value, None)
        if buffer is not None:
            self._release(buffer)

    def _allocate(self, nbytes: int) -> int:
        buffer = next(self._fresh)
        self._bytes[buffer], self._owners[buffer] = nbytes, 1
        self.total_bytes += nbytes
        return buffer

    def _release(self, buffer: int) -> None:
        self._owners[buffer] -= 1
        if not self._owners[buffer]:
            self.total_bytes -= self._bytes.pop(buffer)
            del self._owners[buffer]


def _backward_peak(
    stage: StageCalls,
    saving: list[set[ValueName]],
    extra: list[int],
    boundary: set[ValueName],
    saved_bytes: int,
) -> tuple[int, frozenset[str]]:
    """Return the most bytes alive at once in backward, and the calls whose weight's gradient is left to its end.

    What is alive: the tensors that forward kept and backward has not used up yet, and gradients.
    """
    first_use: dict[ValueName, int] = {}
    for place, values in enumerate(saving):
        for value in values:
            first_use.setdefault(value, place)
    freed: dict[int, list[ValueName]] = {}
    for value, place in first_use.items():
        if value not in boundary:
            freed.setdefault(place, []).append(value)
    gradients = _Gradients(stage)
    parts = Counter(each.value for each in stage.subdag.sends if each.gradient)
    for value in parts:
        gradients.start(value)
    # The caller holds the gradients that arrived. Where a value went to several stages, their sum is alive as well.
    arrived = sum(stage.nbytes[value] * (count + (count > 1)) for value, count in parts.items())
    kept = saved_bytes + arrived
    peak = kept + gradients.total_bytes
    may_wait, deferred = deferrable(stage.subdag), set[str]()
    held: set[ValueName] = set()
    held_bytes = largest_bytes = 0
    for place in range(len(stage.calls) - 1, -1, -1):
        bound = stage.calls[place]
        if not stage.is_graded(bound):
            kept -= total_bytes(stage.nbytes, set(freed.get(place, ())) - held)
            continue
        through = _passed_through(stage, bound)
        wanted = [value for value in bound.reads if value in stage.graded]
        if bound.node.name in may_wait:
            output, used = bound.node.outputs[0], {stage.owner(value) for value in bound.values("input")}
            more = stage.nbytes[output] + total_bytes(stage.nbytes, used - held)
            if held_bytes + more <= MOST_DEFERRED_BYTES:
                weight = bound.values("weight")[0]
                deferred.add(bound.node.name)
                wanted.remove(weight)
                gradients.hold(output)
                held |= used
                held_bytes += more
                largest_bytes = max(largest_bytes, stage.nbytes[weight])
        # The incoming gradients stay alive while the call's own gradients are made.
        made = total_bytes(stage.nbytes, (value for value in wanted if value not in through))
        workspace = bound.traits.backward_workspace
        scratch = workspace(bound.call) if workspace is not None else 0
        peak = max(peak, kept + gradients.total_bytes + made + scratch)
        for value in wanted:
            if value not in stage.weights:
                gradients.add(value, bound.node.outputs[0] if value in through else None)
        for output in bound.node.outputs:
            gradients.drop(output)
        peak = max(peak, kept + gradients.total_bytes)
        kept -= total_bytes(stage.nbytes, set(freed.get(place, ())) - held) + extra[place]
    return max(peak, kept + gradients.total_bytes + largest_bytes), frozenset(deferred)


_PASSING = frozenset({"add", "clone"})
"""Operators, besides views, whose arguments get the output's gradient unchanged."""


def _passed_through(stage: StageCalls, bound: BoundCall) -> set[ValueName]:
    """Return the arguments whose gradient is the output's, or a view of it: it takes no memory of its own."""
    if len(bound.node.outputs) != 1:
        return set()
    output = bound.node.outputs[0]
    if bound.node.op.split(".")[1] not in _PASSING and stage.root[output] == output:
        return set()
    if bound.traits.op_class in ("attention", "matmul"):
        return set()
    return {value for value in bound.reads if stage.nbytes[value] == stage.nbytes[output]}
