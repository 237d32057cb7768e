"""Finds how the values of an OP-DAG behave when microbatches are joined to a batch (see `batch_behaviour`).

The samples lie along axis 0 of every input. A value whose shape has an axis that grows with the batch holds something
for each sample. Other values that depend on inputs are taken over a whole microbatch: sums, means, counts, and what is
computed from them. Operators that are linear keep the weights of microbatches; after others, the weights are unknown.

Inside the model, samples may be mixed by batch norm or by experts that tokens are sent to. That has no weights, and is
computed for each microbatch, as in any gradient accumulation. So a matrix product, or an operator with a trainable
weight, starts anew: what it gives belongs to the samples again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fusionai.graph.batch_axes import BatchAxes
from fusionai.graph.batch_behaviour import (
    FIXED,
    ROWS,
    Behaviour,
    Divisor,
    Growth,
    LabelCount,
    Leaf,
    Unknown,
    divided,
    inverse,
    multiplied_back,
    product,
    total,
)
from fusionai.graph.batch_operators import (
    ADDITIONS,
    ALONG_AN_AXIS,
    CLASSIFICATION,
    COPIES,
    ELEMENTWISE_LOSSES,
    JOINS,
    MEAN,
    MEANS,
    NO_REDUCTION,
    NUMBERING,
    SUMS,
    ZEROS,
)
from fusionai.graph.dependencies import mutated_values, reads
from fusionai.graph.model import Argument, Node, OpDag, Ref, Size, TensorType, ValueName
from fusionai.graph.shape_reads import with_sizes
from fusionai.graph.vocabulary import FLOP_CLASSES, Operator, operator
from fusionai.tensor import FLOATING


class BatchAnalysis:
    """The behaviour of every value of a graph."""

    def __init__(self, graph: OpDag) -> None:
        """Go through the graph once."""
        self.graph = graph
        self.axes = BatchAxes(graph)
        self.growth: dict[ValueName, Growth] = {}
        """By value."""
        self.known: dict[ValueName, ValueName] = {}
        """Values that depend on inputs and constants only, and cost little to compute, each with the first value that
        is computed in the same way."""
        self.leaves: dict[ValueName, frozenset[Leaf] | None] = {}
        """Of known values without an axis of samples: what they are functions of. None: of single samples."""
        self.types: dict[ValueName, TensorType] = dict(graph.types)
        self.nodes = tuple(with_sizes(node, graph.types) for node in graph.nodes)
        """The operators of the graph, without reads of tensors for their shapes only."""
        self._trainable = {weight.name for weight in graph.weights if weight.trainable}
        self._zeros: set[ValueName] = set()
        self._sample_numbers: set[ValueName] = set()
        self._same: dict[tuple[object, ...], ValueName] = {}
        self._begin()
        for node in self.nodes:
            self._take(node)

    def label_counts(self) -> Iterator[LabelCount]:
        """Return what each classification loss of the graph counts, where that is known from inputs."""
        for node in self.nodes:
            bound = operator(node.op).bind(node) if node.op in CLASSIFICATION else {}
            target = bound.get("target")
            if isinstance(target, Ref) and self.types[target.name].dtype not in FLOATING:
                count = self._label_count(node, bound)
                if isinstance(count, LabelCount):
                    yield count

    # --- inputs, weights, and calls -------------------------------------------------------------------------------

    def _begin(self) -> None:
        written = mutated_values(self.graph.nodes)
        for item in self.graph.inputs:
            self.types[item.name] = item.type
            self.known[item.name] = item.name
            if self.axes.of(item.type) == 1:
                self.growth[item.name] = ROWS
            else:
                self.growth[item.name] = Unknown(f"depends on the input {item.name!r}, which has no axis of samples")
                self.leaves[item.name] = None
        for weight in self.graph.weights:
            self.types[weight.name] = weight.type
            if weight.name in written:
                self.growth[weight.name] = Unknown(f"depends on the buffer {weight.key!r}, which changes in training")
                continue
            self.growth[weight.name] = FIXED
            if not weight.trainable:
                self.known[weight.name] = weight.name
                self.leaves[weight.name] = frozenset()

    def _take(self, node: Node) -> None:
        traits = operator(node.op)
        bound = traits.bind(node)
        call = _Call(node, traits, bound, f"{node.op} in {node.scope or 'the model itself'}")
        taken = [self.growth[name] for name in reads(node)]
        lasting = next((each for each in taken if isinstance(each, Unknown) and each.lasting), None)
        for place, output in enumerate(node.outputs):
            axes = self.axes.of(self.types[output])
            if lasting is not None and traits.op_class != "metadata":
                found: Growth = lasting
            elif axes is None:
                found = self._compared(call)
            else:
                found = self._growth(call, output, bool(axes))
            self.growth[output] = found
            self._know(call, place, output, found, bool(axes))

    def _growth(self, call: _Call, output: ValueName, rows: bool) -> Growth:
        """Return the behaviour of an output; `rows`: whether it has something for each sample."""
        op = call.node.op
        if call.traits.op_class == "metadata":
            return self._created(call, output, rows)
        if op in CLASSIFICATION:
            return self._classification(call, rows)
        if op in ELEMENTWISE_LOSSES:
            return self._elementwise_loss(call, call.argument("reduction"), rows)
        if op in ALONG_AN_AXIS and self._along_samples(call):
            return Unknown(f"mixes the samples of a microbatch ({call.where})")
        if (call.traits.view == "self" and not call.traits.mutates) or op in COPIES:
            return self._copied(call, output, rows)
        if op in SUMS or op in MEANS:
            return self._reduced(call, op in MEANS, rows)
        if op == "aten.count_nonzero.dim_IntList" and not rows and self._operand(call.argument("self"), call) == ROWS:
            return Behaviour("whole")
        if op in ("aten.mul.Tensor", "aten.mul.Scalar"):
            return self._product(call)
        if op in ("aten.div.Tensor", "aten.div.Scalar", "aten.reciprocal.default"):
            return self._quotient(call, rows)
        if op in ADDITIONS:
            return self._total(call, [call.argument("self"), call.argument("other")], rows)
        if op in JOINS:
            joined = call.argument("tensors")
            return self._total(call, list(joined) if isinstance(joined, tuple) else [joined], rows, join=True)
        return self._other(call, rows)

    # --- rules ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _compared(call: _Call) -> Unknown:
        return Unknown(f"compares or joins samples of a microbatch with one another ({call.where})", lasting=True)

    def _other(self, call: _Call, rows: bool) -> Growth:
        """Return the behaviour after an operator that need not be linear."""
        taken = [self.growth[name] for name in reads(call.node)]
        if rows and (self._renews(call) or self._picks_by_sample(call)):
            if any(isinstance(each, Behaviour) and not each.plain for each in taken):
                return Unknown(f"puts what was divided by a count or a size through {call.where}")
            return ROWS
        unknown = next((each for each in taken if isinstance(each, Unknown)), None)
        if unknown is not None:
            return unknown
        known = [each for each in taken if isinstance(each, Behaviour)]
        if all(each.plain and each.base != "whole" for each in known):
            if rows:
                return ROWS
            if all(each.base == "fixed" for each in known) and not self.axes.read_as_numbers(call.node):
                return FIXED
        return Unknown(f"puts values of a whole microbatch through {call.where}")

    def _along_samples(self, call: _Call) -> bool:
        source = call.argument("self")
        assert isinstance(source, Ref)
        return self.axes.works_along(self.types[source.name], call.bound.get("dim", call.bound.get("dims", ())))

    def _renews(self, call: _Call) -> bool:
        """Return whether an operator is a layer of the model, after which values belong to samples again."""
        layer = call.traits.op_class in FLOP_CLASSES or call.node.op == "aten.batch_norm.default"
        return layer or any(name in self._trainable for name in reads(call.node))

    def _picks_by_sample(self, call: _Call) -> bool:
        """Return whether each sample picks something of its own, as in `scores[torch.arange(batch), last]`."""
        source, *indices = reads(call.node)
        return (
            call.node.op == "aten.index.Tensor"
            and indices[0] in self._sample_numbers
            and all(self.growth[name] in (ROWS, FIXED) for name in (source, *indices[1:]))
        )

    def _created(self, call: _Call, output: ValueName, rows: bool) -> Growth:
        if rows and call.node.op in NUMBERING:
            self._sample_numbers.add(output)
            return Unknown(f"numbers the samples of a microbatch ({call.where})")
        if not rows and call.node.op in ZEROS:
            self._zeros.add(output)
            return FIXED
        numbers = [call.bound[name] for name in ("s", "fill_value") if name in call.bound]
        sizes = [each.expression for each in numbers if isinstance(each, Size)]
        found: Growth = self._of_size(sizes[0], call) if sizes else FIXED
        return replace(found, base="rows") if rows and isinstance(found, Behaviour) else found

    def _of_size(self, expression: str, call: _Call) -> Growth:
        """Return the behaviour of a size: one that grows with the batch is n times as large in it."""
        linear = self.axes.grows(expression)
        if linear is None:
            return Unknown(f"computes with a size that does not grow in proportion to the batch ({call.where})")
        return Behaviour("fixed", sizes=-1) if linear else FIXED

    def _operand(self, argument: Argument, call: _Call) -> Growth:
        if isinstance(argument, Ref):
            return self.growth[argument.name]
        return self._of_size(argument.expression, call) if isinstance(argument, Size) else FIXED

    def _copied(self, call: _Call, output: ValueName, rows: bool) -> Growth:
        source = call.argument("self")
        assert isinstance(source, Ref)
        growth = self.growth[source.name]
        if isinstance(growth, Unknown):
            return growth
        had_rows = self.axes.of(self.types[source.name]) == 1
        if had_rows and not rows:
            return Unknown(f"picks single samples of a microbatch ({call.where})")
        if rows and not had_rows:
            if growth.base == "whole":
                return Unknown(f"repeats a value of a whole microbatch for every sample ({call.where})")
            return replace(growth, base="rows")
        rounded = self.types[source.name].dtype in FLOATING and self.types[output].dtype not in FLOATING
        return self._other(call, rows) if rounded else growth

    def _reduced(self, call: _Call, mean: bool, rows: bool) -> Growth:
        source = call.argument("self")
        assert isinstance(source, Ref)
        growth = self.growth[source.name]
        if isinstance(growth, Unknown) or growth.base != "rows" or rows:
            return growth
        return replace(growth, base="whole", sizes=growth.sizes + mean)

    def _product(self, call: _Call) -> Growth:
        one, other = call.argument("self"), call.argument("other")
        for count, rest in ((one, other), (other, one)):
            divisor = self._divisor(count)
            growth = self._operand(rest, call)
            if divisor is not None and isinstance(growth, Behaviour) and divisor in growth.divisors:
                return multiplied_back(growth, divisor)
        return product(self._operand(one, call), self._operand(other, call), call.where)

    def _quotient(self, call: _Call, rows: bool) -> Growth:
        if call.node.op == "aten.reciprocal.default":
            above: Growth = FIXED
            below = call.argument("self")
        else:
            above = self._operand(call.argument("self"), call)
            below = call.argument("other")
        divisor = self._divisor(below)
        if divisor is not None:
            return above if isinstance(above, Unknown) else divided(above, divisor)
        growth = self._operand(below, call)
        if not rows and isinstance(growth, Behaviour) and growth.base == "whole":
            return Unknown(f"divides by a value that the model computes over a whole microbatch ({call.where})")
        return product(above, inverse(growth, call.where), call.where)

    def _total(self, call: _Call, terms: list[Argument], rows: bool, *, join: bool = False) -> Growth:
        added = [
            self._operand(each, call)
            for each in terms
            if join or not (each == 0 or (isinstance(each, Ref) and each.name in self._zeros))
        ]
        found = total(added, call.where) if added else FIXED
        return ROWS if rows and found == FIXED else found

    def _elementwise_loss(self, call: _Call, reduction: Argument, rows: bool) -> Growth:
        tensors = list(reads(call.node))
        if reduction == NO_REDUCTION:
            return self._other(call, rows)
        if not any(self.axes.of(self.types[name]) for name in tensors):
            return self._other(call, rows=False)
        if not self.axes.alike(self.types[name] for name in tensors):
            return self._compared(call)  # (B, 1) and (B,) make (B, B)
        for name in tensors:
            growth = self.growth[name]
            if isinstance(growth, Unknown):
                return growth
            if not growth.plain or growth.base == "whole":
                return Unknown(f"puts values of a whole microbatch through {call.where}")
        return Behaviour("whole", sizes=int(reduction == MEAN))

    def _classification(self, call: _Call, rows: bool) -> Growth:
        scores, target = call.argument("self"), call.argument("target")
        reduction = call.argument("reduction")
        assert isinstance(scores, Ref)
        assert isinstance(target, Ref)
        if self.types[target.name].dtype in FLOATING:  # probabilities: the mean is over all samples, weights or not
            return self._elementwise_loss(call, reduction, rows)
        if reduction == NO_REDUCTION or not self.axes.of(self.types[target.name]):
            return self._other(call, rows)
        for name in (scores.name, target.name):
            growth = self.growth[name]
            if isinstance(growth, Unknown):
                return growth
            if growth != ROWS and growth != FIXED:
                return Unknown(f"puts values of a whole microbatch through {call.where}")
        weight = call.argument("weight")
        if isinstance(weight, Ref) and self.growth[weight.name] != FIXED:
            return Unknown(f"weighs classes by what depends on the batch ({call.where})")
        if reduction != MEAN:
            return Behaviour("whole")
        count = self._label_count(call.node, call.bound)
        if isinstance(count, Unknown):
            return count
        return Behaviour("whole", divisors=((count,),))

    def _label_count(self, node: Node, bound: Mapping[str, Argument]) -> LabelCount | Unknown:
        target, weight, ignored = bound["target"], bound["weight"], bound["ignore_index"]
        where = f"{node.op} in {node.scope or 'the model itself'}"
        assert isinstance(target, Ref)
        if target.name not in self.known:
            return Unknown(f"has labels that the model computes ({where})")
        if isinstance(weight, Ref) and weight.name not in self.known:
            return Unknown(f"weighs classes by values that are trained or computed ({where})")
        if not isinstance(ignored, int | Size) or self.axes.read_as_numbers(node):
            return Unknown(f"ignores a label that depends on the size of the batch ({where})")
        of_weight = self.known[weight.name] if isinstance(weight, Ref) else None
        return LabelCount(self.known[target.name], ignored, of_weight)

    # --- what is known from inputs --------------------------------------------------------------------------------

    def _know(self, call: _Call, place: int, output: ValueName, growth: Growth, rows: bool) -> None:
        """Note that an output is known from inputs and constants, and what it is a function of."""
        names = list(dict.fromkeys(reads(call.node)))
        costly = call.traits.random or call.traits.mutates or call.traits.op_class in FLOP_CLASSES
        if costly or any(name not in self.known for name in names):
            return
        key = (call.node.op, *(self._resolved(each) for each in call.bound.values()), place)
        self.known[output] = self._same.setdefault(key, output)
        if rows:
            return
        if self.types[output].dtype == "bfloat16":  # too coarse for counting
            self.leaves[output] = None
            return
        if growth in (Behaviour("whole"), Behaviour("whole", sizes=1)):
            mean = growth != Behaviour("whole")
            self.leaves[output] = frozenset({Leaf(self.known[output], mean)})
            return
        parts = [self.leaves.get(name) for name in names]
        known = [each for each in parts if each is not None]
        self.leaves[output] = frozenset().union(*known) if len(known) == len(parts) else None

    def _resolved(self, argument: Argument) -> object:
        if isinstance(argument, tuple):
            return tuple(self._resolved(each) for each in argument)
        return Ref(self.known[argument.name]) if isinstance(argument, Ref) else (type(argument), argument)

    def _divisor(self, argument: Argument) -> Divisor | None:
        """Return the divisor that an argument is: one number, known from inputs, and a function of sums and means."""
        if not isinstance(argument, Ref) or not self.leaves.get(argument.name):
            return None
        shape = self.types[argument.name].shape
        single = all(isinstance(size, int) for size in shape) and math.prod(int(size) for size in shape) == 1
        return self.known[argument.name] if single else None


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: its node, its operator, its arguments by name, and where it is, for people."""

    node: Node
    traits: Operator
    bound: Mapping[str, Argument]
    where: str

    def argument(self, name: str) -> Argument:
        return self.bound[name]
