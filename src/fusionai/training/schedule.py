"""Pipeline schedules: in which order a stage works through the microbatches of a round. Pure.

One-forward-one-backward (1F1B, PipeDream-Flush; Narayanan et al. 2021, section 2.2): a stage runs as many forwards as
it may keep in flight, then one more for each backward, then drains. The order of the two is not fixed beforehand: a
backward whose gradients are there does not wait for a forward whose tensors are not, but a forward that could run goes
first, so that the stages after it always have work (decision 14). Both directions take the microbatches in index order,
so gradients add up in the same order as in a single process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass of one microbatch through a stage."""

    direction: Literal["forward", "backward"]
    index: int


class StageTurns:
    """Where a stage is in a round."""

    def __init__(self, microbatches: int, in_flight: int, *, train: bool = True) -> None:
        """Begin a round.

        Args:
            microbatches: of the round.
            in_flight: the most between forward and backward; an evaluation has no backwards and no limit.
            train: whether there are backwards.

        Raises ValueError when one of the two is below 1.
        """
        if microbatches < 1 or in_flight < 1:
            raise ValueError(f"microbatches and in_flight must be >= 1, got {microbatches} and {in_flight}")
        self._microbatches = microbatches
        self._in_flight = in_flight if train else microbatches
        self._train = train
        self._forwards = self._backwards = 0

    @property
    def complete(self) -> bool:
        """Whether every pass is done."""
        return self._forwards == self._microbatches and (self._backwards == self._forwards or not self._train)

    def open(self) -> tuple[Turn, ...]:
        """Return the passes that may run next if their tensors are here, the most urgent first: at most one each way.

        A forward goes first: while there is room in memory, what the later stages wait for matters more.
        """
        turns = []
        if self._forwards < self._microbatches and self._forwards - self._backwards < self._in_flight:
            turns.append(Turn("forward", self._forwards))
        if self._train and self._backwards < self._forwards:
            turns.append(Turn("backward", self._backwards))
        return tuple(turns)

    def done(self, turn: Turn) -> None:
        """Count a pass that `open` has returned as done."""
        if turn not in self.open():
            raise ValueError(f"{turn.direction} of microbatch {turn.index} is not due here; {self.open()} are")
        if turn.direction == "forward":
            self._forwards += 1
        else:
            self._backwards += 1
