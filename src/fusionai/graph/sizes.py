"""Size expressions: integers computed from a graph's symbols, such as "s0*(s1 + 1)//2".

Grammar, with `//` and `%` rounding towards minus infinity as in Python:

    sum     = product { ("+" | "-") product }
    product = unary { ("*" | "//" | "%") unary }
    unary   = "-" unary | atom
    atom    = integer | symbol | ("max" | "min") "(" sum { "," sum } ")" | "(" sum ")"

Expressions come from peers, so their length, nesting and results are bounded, and nothing is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from fusionai.errors import GraphError
from fusionai.graph.model import Dim, TensorType
from fusionai.tensor import tensor_bytes

LONGEST_EXPRESSION = 500
"""Most characters of an expression. Expressions that capture makes have fewer than 100."""

DEEPEST_EXPRESSION = 40
"""Most nested parentheses, calls and minus signs. It keeps the recursive parser far below Python's recursion limit."""

LARGEST_SIZE = 1 << 48
"""Every intermediate result stays below this in magnitude, so that products of sizes stay cheap to compute."""

LARGEST_TENSOR_BYTES = 1 << 44
"""16 TiB: larger than any tensor of any model. A larger declared type is an error or an attack."""

_TOKEN = re.compile(r"\s*(?:(\d{1,18})|([A-Za-z_][A-Za-z0-9_]{0,31})|(//|[-+*%(),]))")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
_CALLS: dict[str, Callable[[list[int]], int]] = {"max": max, "min": min}

_Program = Callable[[Mapping[str, int]], int]


def is_symbol(name: str) -> bool:
    """Return whether `name` may be a symbol: a short identifier that is no function of the grammar."""
    return _SYMBOL.fullmatch(name) is not None and name not in _CALLS


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number that `dim` stands for.

    Raises GraphError when the expression is malformed, uses a symbol that `sizes` lacks, divides by zero, or
    exceeds a limit of this module.
    """
    if isinstance(dim, int):
        return dim
    return _compiled(dim).run(sizes)


def symbols_of(dim: Dim) -> frozenset[str]:
    """Return the symbols that an expression uses; GraphError when it is malformed."""
    return frozenset() if isinstance(dim, int) else _compiled(dim).symbols


def concrete(type: TensorType, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of `type` in numbers; GraphError also for a negative size."""
    shape = tuple(evaluate(dim, sizes) for dim in type.shape)
    if any(size < 0 for size in shape):
        raise GraphError(f"shape {list(type.shape)} has a negative size at {dict(sizes)}: {list(shape)}")
    return shape


def type_bytes(type: TensorType, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a dense tensor of `type`; GraphError beyond `LARGEST_TENSOR_BYTES`."""
    found = tensor_bytes(type.dtype, concrete(type, sizes))
    if found > LARGEST_TENSOR_BYTES:
        raise GraphError(
            f"a {type.dtype} tensor of shape {list(type.shape)} takes {found:,} bytes at {dict(sizes)}; "
            f"the limit is {LARGEST_TENSOR_BYTES:,}"
        )
    return found


class _Compiled:
    """A parsed expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.symbols: frozenset[str]
        if len(text) > LONGEST_EXPRESSION:
            raise GraphError(f"size expression of {len(text)} characters; the limit is {LONGEST_EXPRESSION}")
        parser = _SizeParser(text)
        self._program = parser.whole()
        self.symbols = frozenset(parser.symbols)

    def run(self, sizes: Mapping[str, int]) -> int:
        try:
            return self._program(sizes)
        except KeyError as error:
            known = ", ".join(sorted(sizes)) or "none"
            raise GraphError(
                f"size expression {self.text!r} uses the symbol {error.args[0]!r}, which has no value here "
                f"(symbols with one: {known})"
            ) from None
        except ZeroDivisionError:
            raise GraphError(f"size expression {self.text!r} divides by zero at {dict(sizes)}") from None
        except OverflowError:
            raise GraphError(
                f"size expression {self.text!r} exceeds {LARGEST_SIZE:,} in magnitude at {dict(sizes)}"
            ) from None


@lru_cache(maxsize=4096)
def _compiled(text: str) -> _Compiled:
    return _Compiled(text)


def _bounded(value: int) -> int:
    if not -LARGEST_SIZE < value < LARGEST_SIZE:
        raise OverflowError
    return value


class _SizeParser:
    """Parses the tokens by recursive descent, into closures that compute the result."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split(text)
        self._next = 0
        self._depth = 0
        self.symbols: set[str] = set()

    def _split(self, text: str) -> list[str]:
        tokens, at = [], 0
        end = len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._error(f"unexpected {text[at : at + 10]!r}")
            tokens.append(match[1] or match[2] or match[3])
            at = match.end()
        return tokens

    def _error(self, problem: str) -> GraphError:
        return GraphError(
            f"size expression {self._text!r}: {problem}; allowed are integers, symbols, + - * // %, "
            "parentheses, max(a, b) and min(a, b)"
        )

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._next += 1
        return token

    def _expect(self, token: str) -> None:
        found = self._take()
        if found != token:
            raise self._error(f"expected {token!r}, found {found or 'the end'!r}")

    def whole(self) -> _Program:
        program = self._sum()
        if self._peek():
            raise self._error(f"unexpected {self._peek()!r}")
        return program

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > DEEPEST_EXPRESSION:
            raise self._error(f"nested deeper than {DEEPEST_EXPRESSION}")

    def _sum(self) -> _Program:
        first = self._product()
        rest: list[tuple[str, _Program]] = []
        while self._peek() in ("+", "-"):
            rest.append((self._take(), self._product()))
        return _chain(first, rest)

    def _product(self) -> _Program:
        first = self._unary()
        rest: list[tuple[str, _Program]] = []
        while self._peek() in ("*", "//", "%"):
            rest.append((self._take(), self._unary()))
        return _chain(first, rest)

    def _unary(self) -> _Program:
        if self._peek() != "-":
            return self._atom()
        self._take()
        self._deeper()
        operand = self._unary()
        self._depth -= 1
        return lambda sizes: -operand(sizes)

    def _atom(self) -> _Program:
        token = self._take()
        if token.isdigit():
            number = int(token)
            if number >= LARGEST_SIZE:
                raise self._error(f"{token} is beyond {LARGEST_SIZE:,}")
            return lambda sizes: number
        if token == "(":
            self._deeper()
            inner = self._sum()
            self._expect(")")
            self._depth -= 1
            return inner
        if token in _CALLS:
            return self._call(_CALLS[token])
        if _SYMBOL.fullmatch(token):
            self.symbols.add(token)
            return lambda sizes: _bounded(sizes[token])
        raise self._error(f"unexpected {token or 'end'!r}")

    def _call(self, function: Callable[[list[int]], int]) -> _Program:
        self._deeper()
        self._expect("(")
        operands = [self._sum()]
        while self._peek() == ",":
            self._take()
            operands.append(self._sum())
        self._expect(")")
        self._depth -= 1
        return lambda sizes: function([operand(sizes) for operand in operands])


def _chain(first: _Program, rest: list[tuple[str, _Program]]) -> _Program:
    """Return the program that applies binary operators from left to right."""
    if not rest:
        return first

    def run(sizes: Mapping[str, int]) -> int:
        value = first(sizes)
        for symbol, operand in rest:
            other = operand(sizes)
            if symbol == "+":
                value += other
            elif symbol == "-":
                value -= other
            elif symbol == "*":
                value *= other
            elif symbol == "//":
                value //= other
            else:
                value %= other
            value = _bounded(value)
        return value

    return run
