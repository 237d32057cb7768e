"""When machines are there: scripted, or drawn from a seed. A machine's outages do not depend on the order of calls."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from fusionai.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Outage:
    """A machine is gone in [down_s, up_s), seconds of the simulation; `up_s` may be infinite."""

    down_s: float
    up_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.down_s < self.up_s:
            raise ConfigError(f"an outage needs 0 <= down_s < up_s, got {self.down_s} and {self.up_s}")


class Churn(ABC):
    """Says of each machine when it is gone."""

    @abstractmethod
    def outages(self, peer: str) -> Iterator[Outage]:
        """Yield a machine's outages, in order and apart; possibly without end."""


@dataclass(frozen=True, slots=True)
class Scripted(Churn):
    """Outages as listed; machines that are not listed stay. Raises ConfigError when a machine's overlap."""

    by_peer: Mapping[str, tuple[Outage, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for peer, outages in self.by_peer.items():
            for one, other in pairwise(outages):
                if other.down_s <= one.up_s:
                    raise ConfigError(f"the outages of {peer!r} overlap or are out of order: {one} and {other}")

    def outages(self, peer: str) -> Iterator[Outage]:
        """Yield what is listed."""
        return iter(self.by_peer.get(peer, ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson(Churn):
    """Up and down times drawn from exponential distributions, each machine with a generator of its own.

    Raises ConfigError unless both means are positive.
    """

    seed: int
    mean_up_s: float
    mean_down_s: float
    steady: frozenset[str] = frozenset()
    """Peers that never leave, such as the owner's."""

    def __post_init__(self) -> None:
        if not (self.mean_up_s > 0 and self.mean_down_s > 0):
            raise ConfigError(f"mean_up_s and mean_down_s must be > 0, got {self.mean_up_s} and {self.mean_down_s}")

    def outages(self, peer: str) -> Iterator[Outage]:
        """Yield outages without end; every machine is there at the start."""
        if peer in self.steady:
            return
        draw = random.Random(f"{self.seed}:{peer}")
        now_s = 0.0
        while True:
            down_s = now_s + draw.expovariate(1 / self.mean_up_s)
            now_s = down_s + draw.expovariate(1 / self.mean_down_s)
            if now_s > down_s:  # a draw of 0 is no outage
                yield Outage(down_s, now_s)


class OutageCalendar:
    """Answers when machines are there, and remembers the outages drawn so far."""

    def __init__(self, churn: Churn) -> None:
        self._churn = churn
        self._drawing: dict[str, Iterator[Outage]] = {}
        self._drawn: dict[str, list[Outage]] = {}

    def next_down_s(self, peer: str, now_s: float) -> float:
        """Return when a machine is next gone: `now_s` if it is, infinity if it stays."""
        outage = self._next(peer, now_s)
        return max(now_s, outage.down_s) if outage else math.inf

    def up_from_s(self, peer: str, now_s: float) -> float:
        """Return when a machine is next there: `now_s` if it is, infinity if it never comes back."""
        outage = self._next(peer, now_s)
        return outage.up_s if outage and outage.down_s <= now_s else now_s

    def absent_s(self, peer: str, until_s: float) -> float:
        """Return for how long a machine was gone in [0, until_s)."""
        return sum(up_s - down_s for down_s, up_s in self.gone(peer, until_s))

    def gone(self, peer: str, until_s: float) -> list[tuple[float, float]]:
        """Return from when to when a machine was gone in [0, until_s)."""
        self._next(peer, until_s)
        return [(each.down_s, min(each.up_s, until_s)) for each in self._drawn[peer] if each.down_s < until_s]

    def _next(self, peer: str, now_s: float) -> Outage | None:
        """Return the first outage that ends after `now_s`."""
        if peer not in self._drawing:
            self._drawing[peer], self._drawn[peer] = self._churn.outages(peer), []
        drawn = self._drawn[peer]
        while not drawn or drawn[-1].up_s <= now_s:
            if (outage := next(self._drawing[peer], None)) is None:
                return None
            drawn.append(outage)
        # Questions go forward in time, nearly always about the last one drawn.
        place = len(drawn) - 1
        while place and drawn[place - 1].up_s > now_s:
            place -= 1
        return drawn[place]
