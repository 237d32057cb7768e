"""The two faces of a graph: what training runs, and what evaluation runs.

Nearly every model computes the same in both, except for operators that have an inference mode, such as dropout
(`graph.inference`). Then one graph has both faces. A model that asks `self.training` may compute something else in
evaluation. Then the OP-DAG has an `EvaluationGraph`, and each sub-DAG its part of it.
"""

from __future__ import annotations

from fusionai.graph.model import EvaluationGraph, OpDag, SubDag


def face(subdag: SubDag, train: bool) -> SubDag:
    """Return what a stage runs in a round of training or of evaluation; the weights are those of both.

    Where evaluation has no sub-DAG of its own, it runs the sub-DAG of training in inference mode.
    """
    own = subdag.evaluation
    if train or own is None:
        return subdag
    return SubDag(
        index=subdag.index,
        symbols=subdag.symbols,
        inputs=own.inputs,
        weights=subdag.weights,
        nodes=own.nodes,
        types=own.types,
        receives=own.receives,
        sends=own.sends,
        loss=own.loss,
    )


def faces(subdag: SubDag) -> tuple[SubDag, ...]:
    """Return everything that a stage may run: one sub-DAG, or those of training and evaluation."""
    return (subdag,) if subdag.evaluation is None else (subdag, face(subdag, train=False))


def evaluated(graph: OpDag) -> OpDag:
    """Return the graph whose loss an evaluation computes: the evaluation graph, or where there is none the graph."""
    own = graph.evaluation
    return graph if own is None else as_graph(graph, own)


def as_graph(graph: OpDag, evaluation: EvaluationGraph) -> OpDag:
    """Return an evaluation graph of `graph` as an OP-DAG by itself."""
    return OpDag(
        vocabulary=graph.vocabulary,
        name=graph.name,
        symbols=graph.symbols,
        inputs=graph.inputs,
        weights=(*graph.weights, *evaluation.weights),
        nodes=evaluation.nodes,
        types=evaluation.types,
        loss=evaluation.loss,
    )
