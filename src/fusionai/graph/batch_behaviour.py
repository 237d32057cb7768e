"""How a value of a whole batch follows from the values of its microbatches: the algebra behind their shares.

Let a batch be n microbatches, joined along the axis of samples. A value v of the batch and the values v_i that its
microbatches give are related by weights

    w_i = n^-sizes * product over the divisors of (d_i / d)

where d_i is a divisor in microbatch i, and d the same divisor in the batch, such as the number of labels that count.
The sum of a batch has no divisor, so w_i = 1. The mean over samples has sizes = 1, so w_i = 1/n. The mean over the
labels that count has their number as divisor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fusionai.graph.model import Size, ValueName


@dataclass(frozen=True, slots=True)
class LabelCount:
    """How many labels a classification loss counts: those other than `ignored`, each with its class's weight."""

    target: ValueName
    ignored: int | Size
    weight: ValueName | None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value that is known from inputs alone, and of a batch is the sum or the mean of the microbatches' values."""

    value: ValueName
    mean: bool


Divisor = ValueName | tuple[LabelCount, ...]
"""A value of the graph that depends on inputs and constants only, or the sum of some numbers of labels."""

Counts = tuple[int, tuple[Divisor, ...]]
"""`sizes` and `divisors` of a behaviour: all that its weights depend on."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How one value behaves, with weights w_i of the module's text.

    `fixed`: v = w_i v_i for every i, so without counts it is the same in all microbatches. `rows`: v joins all w_i v_i
    along an axis. `whole`: v is the sum of all w_i v_i.
    """

    base: Literal["fixed", "rows", "whole"]
    sizes: int = 0
    divisors: tuple[Divisor, ...] = ()
    needs: frozenset[Counts] = frozenset()
    """Counts whose weights must add up to 1, because a term was added that is the same in all microbatches."""

    @property
    def counts(self) -> Counts:
        """What the weights depend on."""
        return self.sizes, self.divisors

    @property
    def plain(self) -> bool:
        """Whether all weights are 1."""
        return not self.sizes and not self.divisors


@dataclass(frozen=True, slots=True)
class Unknown:
    """No weights are known."""

    reason: str
    """What the loss does: the rest of a sentence that starts with "the loss"."""
    lasting: bool = False
    """Whether nothing that is computed from it can be told either: samples were compared with one another."""


Growth = Behaviour | Unknown

FIXED = Behaviour("fixed")
ROWS = Behaviour("rows")


def divided(counts: Behaviour, divisor: Divisor) -> Behaviour:
    """Return the behaviour after a division by a divisor."""
    return replace(counts, divisors=_sorted((*counts.divisors, divisor)))


def product(one: Growth, other: Growth, where: str) -> Growth:
    """Return the behaviour of a product; `where` names the operator, for a reason."""
    if isinstance(one, Unknown):
        return one
    if isinstance(other, Unknown):
        return other
    if "whole" in (one.base, other.base) and "fixed" not in (one.base, other.base):
        return Unknown(f"multiplies by a value that is taken over a whole microbatch ({where})")
    base = other.base if one.base == "fixed" else one.base
    divisors = _sorted((*one.divisors, *other.divisors))
    return Behaviour(base, one.sizes + other.sizes, divisors, one.needs | other.needs)


def multiplied_back(quotient: Behaviour, divisor: Divisor) -> Behaviour:
    """Return the behaviour after a multiplication by one of its divisors."""
    left = list(quotient.divisors)
    left.remove(divisor)
    return replace(quotient, divisors=tuple(left))


def inverse(value: Growth, where: str) -> Growth:
    """Return the behaviour of 1 / value, for a value of which no sum is taken."""
    if isinstance(value, Unknown):
        return value
    if value.divisors or value.base == "whole" or (value.base == "rows" and value.sizes):
        return Unknown(f"divides by a value that is taken over a whole microbatch ({where})")
    return replace(value, sizes=-value.sizes)


def total(terms: Sequence[Growth], where: str) -> Growth:
    """Return the behaviour of a sum of terms."""
    found = terms[0]
    for term in terms[1:]:
        found = _sum(found, term, where)
    return found


def _sum(one: Growth, other: Growth, where: str) -> Growth:
    if isinstance(one, Unknown):
        return one
    if isinstance(other, Unknown):
        return other
    needs = one.needs | other.needs
    if one.base == other.base:
        if one.counts == other.counts:
            return replace(one, needs=needs)
        return Unknown(f"adds terms that count different labels or samples ({where})")
    if "whole" not in (one.base, other.base):
        if one.plain and other.plain:
            return ROWS
        return Unknown(f"adds terms that are divided by different counts ({where})")
    whole, added = (one, other) if one.base == "whole" else (other, one)
    if added.base == "fixed" and added.plain and (whole.divisors or whole.sizes == 1):
        return replace(whole, needs=needs | {whole.counts})
    if added.base == "fixed" and added.plain and whole.plain:
        return Unknown(f"adds a sum over samples and a term that depends on no sample ({where})")
    return Unknown(f"adds a value that is taken over a whole microbatch and one that is not ({where})")


def _sorted(divisors: tuple[Divisor, ...]) -> tuple[Divisor, ...]:
    return tuple(sorted(divisors, key=repr))
