"""Turns the tracer's symbolic sizes (sympy) into the size expressions of an OP-DAG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from fusionai.errors import GraphError
from fusionai.graph.model import Dim

_FLOOR_DIVISIONS = {"FloorDiv", "CleanDiv"}
_REMAINDERS = {"Mod", "PythonMod"}
"""Names of torch's sympy functions for remainders. Sizes are never negative, so all of them agree."""

_SUM, _PRODUCT, _ATOM = 0, 1, 2
_Text = tuple[str, int]
"""An expression and how tightly its outermost operator binds."""


class UnknownSizeError(GraphError):
    """A size depends on the data of a tensor, or has no form in the grammar of sizes."""


def size_expression(size: Any, symbols: Mapping[str, str]) -> Dim:
    """Return a size in our grammar: a number, or an expression over our symbols.

    `size` is an int or a torch.SymInt; `symbols` maps the tracer's symbol names to ours. Raises
    UnknownSizeError for a size that is no function of the symbols, or has no form in the grammar.
    """
    return size if isinstance(size, int) else _expression(sympy.sympify(size.node.expr), symbols)


def whole_number_expression(number: Any, symbols: Mapping[str, str]) -> Dim:
    """Return a torch.SymFloat that is a sum or product of sizes, as a size; UnknownSizeError for any other."""
    expression = sympy.sympify(number.node.expr)
    expression = expression.replace(lambda each: type(each).__name__ == "ToFloat", lambda each: each.args[0])
    expression = expression.replace(
        lambda each: each.is_Float and float(each).is_integer(), lambda each: sympy.Integer(int(each))
    )
    return _expression(expression, symbols)


def _expression(expression: Any, symbols: Mapping[str, str]) -> Dim:
    # The tracer's symbols carry assumptions, so they are replaced by identity and not by name.
    expression = expression.xreplace(
        {
            symbol: sympy.Symbol(symbols[symbol.name], integer=True, positive=True)
            for symbol in expression.free_symbols
            if symbol.name in symbols
        }
    )
    if expression.is_Integer:
        return int(expression)
    return _write(expression, frozenset(symbols.values()))[0]


def _write(expression: Any, known: frozenset[str]) -> _Text:
    """Write a sympy expression; arguments come in sympy's canonical order, so equal sizes read equal."""
    name = type(expression).__name__
    if expression.is_Integer:
        return (str(int(expression)), _ATOM) if int(expression) >= 0 else (f"({int(expression)})", _ATOM)
    if expression.is_Symbol:
        if expression.name not in known:
            raise UnknownSizeError(f"the size {expression} depends on the values in a tensor")
        return expression.name, _ATOM
    if expression.is_Add:
        positive: list[str] = []
        negative: list[str] = []
        for term in expression.as_ordered_terms():
            group, part = (negative, -term) if term.could_extract_minus_sign() else (positive, term)
            group.append(_wrap(_write(part, known), _PRODUCT))
        text = " + ".join(positive) or "0"
        return "".join([text, *(f" - {part}" for part in negative)]), _SUM
    if expression.is_Mul:
        parts = [_wrap(_write(part, known), _ATOM) for part in expression.as_ordered_factors()]
        return "*".join(parts), _PRODUCT
    if expression.is_Pow and expression.exp.is_Integer and 0 < expression.exp <= 8:
        part = _wrap(_write(expression.base, known), _ATOM)
        return "*".join([part] * int(expression.exp)), _PRODUCT
    if name in _FLOOR_DIVISIONS or name in _REMAINDERS:
        left, right = (_wrap(_write(part, known), _ATOM) for part in expression.args)
        return f"({left} {'//' if name in _FLOOR_DIVISIONS else '%'} {right})", _ATOM
    if name in ("Max", "Min"):
        parts = sorted(_write(part, known)[0] for part in expression.args)
        text = parts[-1]
        for part in reversed(parts[:-1]):
            text = f"{name.lower()}({part}, {text})"
        return text, _ATOM
    if name == "CeilDiv":
        left, right = (_wrap(_write(part, known), _ATOM) for part in expression.args)
        return f"(({left} + {right} - 1) // {right})", _ATOM
    raise UnknownSizeError(f"the size {expression} ({name}) has no form in an OP-DAG")


def _wrap(text: _Text, tightness: int) -> str:
    return text[0] if text[1] >= tightness else f"({text[0]})"
