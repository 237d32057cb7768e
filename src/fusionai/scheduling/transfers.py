"""What changes hands between two plans, and how long that takes.

A machine that gets a weight gets its optimizer states with it; what it holds already it keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import msgspec

from fusionai.graph.model import OpDag, Sizes, WeightKey
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.estimator import delay_s
from fusionai.scheduling.problem import TrainingProblem

Holders = Mapping[WeightKey, frozenset[str]]

LOST = ""
"""Source of what nobody alive holds."""


class Move(msgspec.Struct, frozen=True):
    """One weight, with its optimizer states, that a machine must get."""

    key: WeightKey
    source: str
    """A machine that holds it; "" when nobody alive does, and the state comes from a snapshot."""
    target: str
    nbytes: int


def state_bytes(graph: OpDag, sizes: Sizes, optimizer_states: int) -> dict[WeightKey, int]:
    """Return the bytes that move with each weight: itself, and its optimizer states if it is trained."""
    return {
        weight.key: type_bytes(weight.type, sizes) * (1 + optimizer_states if weight.trainable else 1)
        for weight in graph.weights
    }


def holders_of(holds: Mapping[str, Iterable[WeightKey]]) -> dict[WeightKey, frozenset[str]]:
    """Return the machines by weight, from the weights by machine."""
    found: dict[WeightKey, set[str]] = {}
    for peer, keys in holds.items():
        for key in keys:
            found.setdefault(key, set()).add(peer)
    return {key: frozenset(peers) for key, peers in found.items()}


class TransferSchedule:
    """Ways and times of moves among the machines of a problem, those that leave among them.

    One machine's transfers share its access, each way: they are reckoned one after the other, those of different
    machines at the same time. Then the time is the largest sum of seconds that leave or enter any machine, and a
    schedule that takes no longer exists (open shop with preemption: Gonzalez and Sahni, JACM 23(4), 1976).
    """

    def __init__(self, problem: TrainingProblem) -> None:
        """Know the machines of `problem`; a machine that is not among them has left."""
        self._problem = problem
        self._number_of = problem.number_of
        self.source = cache(self._source)
        """Return the best of (holders, target) to get a weight from; `LOST` if no holder is there."""
        self.legs = cache(self._legs)
        """Return the (sender, receiver, seconds for each byte, latency in seconds) of the way from source to target."""

    def _source(self, holders: frozenset[str], target: str) -> str:
        there = [peer for peer in sorted(holders) if peer in self._number_of]
        return min(there, key=lambda peer: sum(leg[2] for leg in self.legs(peer, target)), default=LOST)

    def _legs(self, source: str, target: str) -> tuple[tuple[str, str, float, float], ...]:
        problem, owner = self._problem, self._problem.owner
        if source == LOST:
            # Snapshots lie with several machines, the runtime knows where: the best way in stands for theirs.
            ways = [
                self._leg(peer, target) for peer in self._number_of if peer != target and self._linked(peer, target)
            ]
            _, _, least_s, latency_s = min(ways, key=lambda leg: leg[2], default=("", "", 0.0, 0.0))
            return ((LOST, target, least_s, latency_s),)
        if owner is None or problem.reachable(self._number_of[source], self._number_of[target]):
            return (self._leg(source, target),)
        # Neither can be dialled: both are linked with the owner's machine, as every member of a plan is.
        return self._leg(source, owner.peer), self._leg(owner.peer, target)

    def _linked(self, source: str, target: str) -> bool:
        return self._problem.reachable(self._number_of[source], self._number_of[target])

    def _leg(self, source: str, target: str) -> tuple[str, str, float, float]:
        link = self._problem.link(self._number_of[source], self._number_of[target])
        return source, target, 1 / link.bandwidth_bytes_per_s, delay_s(link)

    def byte_s(self, holders: frozenset[str], target: str) -> float:
        """Return the seconds that each byte takes to `target` from the best of `holders`."""
        return sum(leg[2] for leg in self.legs(self.source(holders, target), target))

    def moves_s(self, loads: Mapping[tuple[str, str], int]) -> float:
        """Return the seconds in which the bytes by (source, target) are where they belong."""
        leaving: dict[str, float] = {}
        entering: dict[str, float] = {}
        last_s = 0.0
        for (source, target), nbytes in loads.items():
            if not nbytes:
                continue
            legs = self.legs(source, target)
            last_s = max(last_s, sum(leg[3] for leg in legs))
            for sender, receiver, byte_s, _ in legs:
                if sender != LOST:
                    leaving[sender] = leaving.get(sender, 0.0) + nbytes * byte_s
                entering[receiver] = entering.get(receiver, 0.0) + nbytes * byte_s
        return max([*leaving.values(), *entering.values()], default=0.0) + last_s

    def moves(
        self, before: Holders, after: Mapping[str, Iterable[WeightKey]], nbytes: Mapping[WeightKey, int]
    ) -> tuple[Move, ...]:
        """Return what each machine must get to hold `after`, given who held what before. In a fixed order."""
        nobody: frozenset[str] = frozenset()
        return tuple(
            Move(key, self.source(before.get(key, nobody), peer), peer, nbytes[key])
            for peer in sorted(after)
            for key in sorted(after[peer])
            if peer not in before.get(key, nobody)
        )


def loads_of(moves: Iterable[Move]) -> dict[tuple[str, str], int]:
    """Return the bytes by source and target."""
    found: dict[tuple[str, str], int] = {}
    for each in moves:
        found[each.source, each.target] = found.get((each.source, each.target), 0) + each.nbytes
    return found
