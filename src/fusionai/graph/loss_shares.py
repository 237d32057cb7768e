"""What the microbatches of a step count for, as the graph of the loss says.

A step's batch is cut into microbatches. The sum of share_i * loss_i must be the loss of the whole batch. The shares
follow from how the loss comes about: by a mean over samples, a sum, or a mean over the labels that count
(`batch_analysis`). Where they depend on data, two small sub-DAGs compute what they need from the inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from fusionai.errors import ConfigError
from fusionai.graph.batch_analysis import BatchAnalysis
from fusionai.graph.batch_behaviour import Counts, Divisor, LabelCount, Leaf, Unknown
from fusionai.graph.dependencies import producers, reads
from fusionai.graph.model import Argument, Atom, Dim, Keyword, Node, OpDag, Ref, SubDag, TensorType, Transfer, ValueName
from fusionai.tensor import DType

LossShare = Literal["auto", "labels", "equal"]
"""`auto`: as the graph says. `labels`: by the labels that count. `equal`: every microbatch alike."""

IGNORED_LABEL = -100
"""Labels with this value do not count where the graph does not say which do (torch's default `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Equal:
    """Every microbatch of a step counts alike: 1/n each."""

    reason: str = ""
    """Why it cannot be told what they count for: the rest of a sentence that starts with "the loss". Empty: this is
    exactly right."""


@dataclass(frozen=True, slots=True)
class Sum:
    """The losses of the microbatches add up: 1 each."""


@dataclass(frozen=True, slots=True)
class Counted:
    """The share of microbatch i of n is n^-sizes * product over the divisors of (d_i / d).

    d is the divisor of the whole batch: the function `merging` of the merged `leaves`.
    """

    sizes: int
    divisors: tuple[ValueName, ...]
    leaves: tuple[Leaf, ...]
    """Values of a microbatch that add up, or whose mean is taken, in the whole batch."""
    counting: SubDag
    """Stage 0: inputs to the leaves and the divisors."""
    merging: SubDag | None
    """Stage 1: leaves to the divisors that are no leaves themselves. None: all of them are leaves."""
    needs: tuple[tuple[int, tuple[ValueName, ...]], ...]
    """Sizes and divisors whose shares must add up to 1, since the loss has a term that is the same in all
    microbatches."""
    batch: frozenset[str]
    """Symbols of the axis of samples."""


Shares = Equal | Sum | Counted


def loss_shares(graph: OpDag, choice: LossShare = "auto") -> Shares:
    """Return what the microbatches of a graph's steps count for.

    Raises ConfigError when they shall count by labels, and the graph has none.
    """
    if choice == "equal":
        return Equal()
    analysis = BatchAnalysis(graph)
    if choice == "labels":
        return _Counting(analysis).shares(0, [_labels(analysis)], ())
    growth = analysis.growth[graph.loss]
    if isinstance(growth, Unknown):
        return Equal(growth.reason)
    if growth.base != "whole":
        return Equal() if growth.plain else Equal("divides by a count what depends on no sample")
    if growth.divisors or growth.sizes not in (0, 1):
        return _Counting(analysis).shares(growth.sizes, growth.divisors, growth.needs)
    return Equal() if growth.sizes else Sum()


def _labels(analysis: BatchAnalysis) -> tuple[LabelCount, ...]:
    """Return what counts by labels: those of classification losses on inputs of that role, else these inputs."""
    labels = [item for item in analysis.graph.inputs if item.role == "labels" and item.type.dtype == "int64"]
    if not labels:
        raise ConfigError(
            'training.loss_share is "labels", but the model has no input of int64 labels; use "auto" or "equal"'
        )
    names = {item.name for item in labels}
    found = [count for count in analysis.label_counts() if names & _sources(analysis.graph, [count.target])]
    return tuple(dict.fromkeys(found)) or tuple(LabelCount(item.name, IGNORED_LABEL, None) for item in labels)


def _sources(graph: OpDag, values: Iterable[ValueName]) -> set[ValueName]:
    """Return all values that the given ones depend on, themselves included."""
    made = producers(graph.nodes)
    found = set(values)
    waiting = list(found)
    while waiting:
        place = made.get(waiting.pop())
        for name in reads(graph.nodes[place]) if place is not None else ():
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


class _Counting:
    """Makes the sub-DAGs that compute divisors."""

    def __init__(self, analysis: BatchAnalysis) -> None:
        self._analysis = analysis
        self._graph = analysis.graph
        self._added: list[Node] = []
        self._types: dict[ValueName, TensorType] = {}
        self._names: dict[Divisor, ValueName] = {}

    def shares(self, sizes: int, divisors: Sequence[Divisor], needs: Iterable[Counts]) -> Counted:
        names = tuple(self._named(each) for each in divisors)
        needed = tuple((size, tuple(self._named(each) for each in inner)) for size, inner in needs)
        every = list(dict.fromkeys([*names, *(name for _, inner in needed for name in inner)]))
        leaves: dict[ValueName, Leaf] = {}
        for name in every:
            known = self._analysis.leaves.get(name)
            for leaf in known if known is not None else (Leaf(name, mean=False),):
                leaves[leaf.value] = leaf
        derived = [name for name in every if name not in leaves]
        counting = self._subdag(0, [*leaves, *derived], ())
        return Counted(
            sizes=sizes,
            divisors=names,
            leaves=tuple(leaves.values()),
            counting=counting,
            merging=self._subdag(1, derived, tuple(leaves)) if derived else None,
            needs=needed,
            batch=self._analysis.axes.symbols,
        )

    # --- sub-DAGs -------------------------------------------------------------------------------------------------

    def _subdag(self, stage: int, gives: Sequence[ValueName], takes: tuple[ValueName, ...]) -> SubDag:
        """Return the sub-DAG that computes `gives` from the values `takes`, inputs and constants."""
        nodes = self._nodes()
        made = producers(nodes)
        places: set[int] = set()
        taken: set[ValueName] = set()
        waiting = list(gives)
        while waiting:
            name = waiting.pop()
            taken.add(name)
            place = made.get(name)
            if place is not None and name not in takes and place not in places:
                places.add(place)
                waiting.extend(reads(nodes[place]))
        kept = [nodes[place] for place in sorted(places)]
        return SubDag(
            index=stage,
            symbols=self._graph.symbols,
            inputs=tuple(item for item in self._graph.inputs if item.name in taken),
            weights=tuple(weight for weight in self._graph.weights if weight.name in taken),
            nodes=tuple(kept),
            types={output: self._type(output) for node in kept for output in node.outputs},
            receives=tuple(
                Transfer(name, stage - 1, stage, self._type(name), False) for name in takes if name in taken
            ),
            sends=tuple(Transfer(name, stage, stage + 1, self._type(name), False) for name in gives),
            loss=None,
        )

    def _nodes(self) -> list[Node]:
        """Return all operators; those that compute one thing twice are replaced by the first of them."""
        known = self._analysis.known

        def renamed(atom: Atom) -> Atom:
            return Ref(known.get(atom.name, atom.name)) if isinstance(atom, Ref) else atom

        def first(argument: Argument) -> Argument:
            if isinstance(argument, tuple):
                return tuple(renamed(each) for each in argument)
            return renamed(argument)

        return [
            msgspec.structs.replace(
                node,
                args=tuple(first(each) for each in node.args),
                kwargs={name: first(each) for name, each in node.kwargs.items()},
            )
            for node in (*self._analysis.nodes, *self._added)
        ]

    def _type(self, name: ValueName) -> TensorType:
        return self._types.get(name) or self._analysis.types[name]

    # --- numbers of labels ----------------------------------------------------------------------------------------

    def _named(self, divisor: Divisor) -> ValueName:
        """Return the value of a divisor; a number of labels is computed by operators that are added to the graph."""
        if isinstance(divisor, str):
            return divisor
        if divisor not in self._names:
            first, *others = [self._labels_that_count(each) for each in divisor]
            for other in others:
                first = self._node("aten.add.Tensor", "float64", (), Ref(first), Ref(other))
            self._names[divisor] = first
        return self._names[divisor]

    def _labels_that_count(self, count: LabelCount) -> ValueName:
        shape = self._analysis.types[count.target].shape
        target = Ref(count.target)
        if count.weight is None:
            counts = self._node("aten.ne.Scalar", "bool", shape, target, count.ignored)
        else:
            ignored = Ref(self._node("aten.eq.Scalar", "bool", shape, target, count.ignored))
            index = Ref(self._node("aten.to.dtype", "int64", shape, target, Keyword("dtype", "int64")))
            classes = Ref(self._node("aten.masked_fill.Scalar", "int64", shape, index, ignored, 0))
            dtype = self._type(count.weight).dtype
            weighed = self._node("aten.index.Tensor", dtype, shape, Ref(count.weight), (classes,))
            counts = self._node("aten.masked_fill.Scalar", dtype, shape, Ref(weighed), ignored, 0)
        exact = Keyword("dtype", "float64")
        return self._node("aten.sum.default", "float64", (), Ref(counts), dtype=exact)

    def _node(self, op: str, made: DType, shape: tuple[Dim, ...], *args: Argument, **kwargs: Argument) -> ValueName:
        """Add an operator whose result has the dtype `made`, and return the result's name."""
        # A space cannot occur in the name of a captured value.
        name = ValueName(f"count {len(self._added)}")
        self._types[name] = TensorType(made, shape)
        self._added.append(Node(name, op, args, kwargs, (name,)))
        return name
