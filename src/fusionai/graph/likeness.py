"""Sub-DAGs that are alike but for names cost the same: a model's layers need to be costed once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from fusionai.graph.cost import StageCost, stage_cost
from fusionai.graph.model import Argument, Ref, Sizes, SubDag


def stage_costs(subdags: Sequence[SubDag], sizes: Sizes, known: dict[Hashable, StageCost]) -> list[StageCost]:
    """Return what sub-DAGs of one graph cost, as `cost.stage_cost` does; `known` keeps what was costed, by likeness.

    Raises GraphError as that does.
    """
    found = []
    for subdag in subdags:
        key = likeness(subdag)
        if key not in known:
            known[key] = stage_cost(subdag, sizes)
        found.append(known[key])
    return found


def likeness(subdag: SubDag) -> Hashable:
    """Return a key that is equal for sub-DAGs of one graph that differ in the names of values and weights alone.

    The names of graph inputs stay: costs are told apart by them.
    """
    numbers: dict[str, int] = {}
    keys: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    def number_of_key(key: str) -> int:
        return keys.setdefault(key, len(keys))

    def plain(argument: Argument) -> Hashable:
        if isinstance(argument, tuple):
            return tuple(plain(each) for each in argument)
        # 1, 1.0 and True are equal, but not alike.
        return (Ref, number(argument.name)) if isinstance(argument, Ref) else (type(argument), argument)

    received = tuple((number(each.value), each.type, each.gradient) for each in subdag.receives)
    inputs = tuple((number(each.name), each) for each in subdag.inputs)
    weights = tuple(
        (
            number(each.name),
            number_of_key(each.key),
            each.type,
            each.kind,
            each.trainable,
            not each.aliases,
        )
        for each in subdag.weights
    )
    nodes = tuple(
        (
            node.op,
            tuple(plain(argument) for argument in node.args),
            tuple((name, plain(argument)) for name, argument in node.kwargs.items()),
            tuple((number(output), subdag.types[output]) for output in node.outputs),
        )
        for node in subdag.nodes
    )
    sent = tuple((number(each.value), each.type, each.gradient) for each in subdag.sends)
    return received, inputs, weights, nodes, sent, None if subdag.loss is None else number(subdag.loss)
