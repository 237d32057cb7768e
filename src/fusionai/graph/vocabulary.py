"""The vocabulary: every operator that an OP-DAG may contain. No machine runs any other operator.

`aten.*` are torch's composite operators, with torch's names and argument order. `fusion.*` are operators of this
project. A plane finds operators through this table only, so a peer cannot name an operator that reads files or
uninitialised memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from fusionai.errors import GraphError
from fusionai.graph.operators import (
    creation,
    elementwise,
    indexing,
    linear,
    loss,
    normalisation,
    reduction,
    view,
)
from fusionai.graph.operators.schema import FLOP_CLASSES, Operator, Parameter

__all__ = ["FLOP_CLASSES", "VOCABULARY", "VOCABULARY_VERSION", "Operator", "Parameter", "operator"]

VOCABULARY_VERSION = 1
"""Rises when an operator is removed or changes its meaning. A new operator does not change it."""

_FAMILIES = (linear, elementwise, normalisation, reduction, loss, indexing, view, creation)

VOCABULARY: Mapping[str, Operator] = MappingProxyType(
    {operator.name: operator for family in _FAMILIES for operator in family.OPERATORS}
)
"""Every operator, by name."""


def operator(name: str) -> Operator:
    """Return the operator of that name. Raises GraphError, which suggests similar names, when there is none."""
    found = VOCABULARY.get(name)
    if found is None:
        shown = name if len(name) <= 100 else name[:97] + "..."
        near = difflib.get_close_matches(shown, VOCABULARY, n=3, cutoff=0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise GraphError(
            f"operator {shown!r} is not in vocabulary version {VOCABULARY_VERSION}{hint}; rewrite the model "
            "without it, or add it as docs/add-an-operator.md describes"
        )
    return found
