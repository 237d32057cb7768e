"""Pipeline schedules: in which order a stage works through the microbatches of a round. Pure.

One-forward-one-backward (1F1B, PipeDream-Flush; Narayanan et al. 2021, section 2.2): a stage first runs as many
forwards as it may keep in flight, then alternates one backward with one forward, then drains. Both directions
take the microbatches in index order, so gradients add up in the same order as in a single process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass of one microbatch through a stage."""

    direction: Literal["forward", "backward"]
    index: int


def one_forward_one_backward(microbatches: int, in_flight: int) -> tuple[Turn, ...]:
    """Return a stage's turns for `microbatches`, never holding more than `in_flight` (at least 1) at once."""
    if microbatches < 1 or in_flight < 1:
        raise ValueError(f"microbatches and in_flight must be >= 1, got {microbatches} and {in_flight}")
    warmup = min(microbatches, in_flight)
    turns = [Turn("forward", index) for index in range(warmup)]
    for index in range(microbatches):
        turns.append(Turn("backward", index))
        if warmup + index < microbatches:
            turns.append(Turn("forward", warmup + index))
    return tuple(turns)


def forward_only(microbatches: int) -> tuple[Turn, ...]:
    """Return a stage's turns for an evaluation."""
    return tuple(Turn("forward", index) for index in range(microbatches))
