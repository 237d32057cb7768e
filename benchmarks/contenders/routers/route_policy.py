"""What decides to which holder of the next stage a microbatch goes.

A policy is told what happens and asked for decisions; it has no clock, sends nothing and draws no random numbers. The
simulator calls it with simulated times, and a training runtime may call it with real ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hop:
    """A microbatch at a sender that needs a holder of `stage`."""

    now_s: float
    sender: int
    """Machine, or `job.DRIVER`."""
    stage: int
    microbatch: int


class RoutePolicy(ABC):
    """Chooses holders. Machines and stages are numbered as in the job."""

    @abstractmethod
    def choose(self, hop: Hop, candidates: Sequence[int]) -> int:
        """Return one of `candidates` (not empty): the holders of the stage that are not known to be dead."""

    @abstractmethod
    def wait_s(self, sender: int, stage: int, machine: int) -> float:
        """Return after how long without an answer a sender gives a machine up, where only timeouts tell of deaths."""

    def began_step(self) -> None:  # noqa: B027 - not every policy listens
        """Hear that a step begins: no machine has anything to do, and no link anything to send."""

    def assigned(self, hop: Hop, machine: int) -> None:  # noqa: B027
        """Hear that a microbatch was sent to `machine`."""

    def computed(self, stage: int, machine: int, *, backward: bool) -> None:  # noqa: B027
        """Hear that a machine finished a pass."""

    def answered(self, sender: int, stage: int, machine: int, response_s: float) -> None:  # noqa: B027
        """Hear how long after it was sent a machine's forward was reported back to the sender."""

    def unanswered(self, sender: int, stage: int, machine: int) -> None:  # noqa: B027
        """Hear that a sender gave a machine up."""

    def withdrawn(self, stage: int, machine: int, *, forward_done: bool, backward_done: bool) -> None:  # noqa: B027
        """Hear that a microbatch is no longer the machine's: it died, or the microbatch begins again elsewhere."""

    def joined(self, stage: int, machine: int) -> None:  # noqa: B027
        """Hear that a machine holds a stage from now on."""

    def left(self, stage: int, machine: int) -> None:  # noqa: B027
        """Hear that a machine no longer holds a stage, as far as is known."""
