from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionai.errors import GraphError
from fusionai.graph.model import TensorType
from fusionai.graph.sizes import LARGEST_SIZE, concrete, evaluate, is_symbol, symbols_of, type_bytes

SIZES = {"s0": 5, "s1": 12}


def expressions() -> st.SearchStrategy[str]:
    """Expressions that mean the same in Python, so that Python is the reference."""
    atoms = st.one_of(st.integers(0, 999).map(str), st.sampled_from(["s0", "s1"]))
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%", " + ", " // "]), inner).map("".join),
            inner.map("({})".format),
            inner.map("-({})".format),
            st.tuples(st.sampled_from(["max", "min"]), inner, inner).map(
                lambda each: f"{each[0]}({each[1]}, {each[2]})"
            ),
        ),
        max_leaves=12,
    )


@given(expressions())
def test_means_what_python_means(expression: str) -> None:
    try:
        expected = eval(expression, {"__builtins__": {}, "max": max, "min": min}, SIZES)  # noqa: S307
    except ZeroDivisionError:
        with pytest.raises(GraphError, match="divides by zero"):
            evaluate(expression, SIZES)
        return
    try:
        found, symbols = evaluate(expression, SIZES), symbols_of(expression)
    except GraphError as error:
        refusal = str(error)
        assert "exceeds" in refusal or len(expression) > 100
        return
    assert found == expected
    assert symbols == {name for name in SIZES if name in expression}


@given(st.text(alphabet="s01+-*/%()max, .\x00é'\"[]_", max_size=80))
def test_anything_else_is_a_graph_error(expression: str) -> None:
    try:
        assert abs(evaluate(expression, SIZES)) <= LARGEST_SIZE
    except GraphError:
        pass


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("s0 ** 2", "expected|unexpected"),
        ("", "unexpected 'end'"),
        ("s9 + 1", "no value here"),
        ("s0 // (s1 - 12)", "divides by zero"),
        ("1000000000000000 * 10", "beyond"),
        ("s1" + "*s1" * 60, "exceeds"),
        ("(" * 100 + "1" + ")" * 100, "nested deeper"),
        ("-" * 100 + "1", "nested deeper"),
        ("1+" * 400 + "1", "characters"),
        ("__import__('os')", "unexpected"),
        ("max()", "unexpected"),
    ],
)
def test_refusals_say_why(expression: str, text: str) -> None:
    with pytest.raises(GraphError, match=text):
        evaluate(expression, SIZES)


def test_a_hostile_expression_costs_little() -> None:
    started_s = time.process_time()
    for expression in ("s1*" * 166 + "s1", "max(" * 39 + "1" + ",1)" * 39, "((((" * 9 + "s0" + "))))" * 9):
        try:
            evaluate(expression, SIZES)
        except GraphError:
            pass
    assert time.process_time() - started_s < 10


def test_types_at_sizes() -> None:
    type = TensorType("bfloat16", ("s0", 3, "s1//2"))
    assert concrete(type, SIZES) == (5, 3, 6)
    assert type_bytes(type, SIZES) == 5 * 3 * 6 * 2
    with pytest.raises(GraphError, match="negative"):
        concrete(TensorType("float32", ("s0-9",)), SIZES)
    with pytest.raises(GraphError, match="limit"):
        type_bytes(TensorType("float32", (1 << 40, 1 << 10)), {})


def test_symbols_are_identifiers() -> None:
    assert is_symbol("s0")
    assert not any(is_symbol(name) for name in ("max", "0s", "", "s 0", "x" * 33))
