"""1F1B turns: complete, in order, never more in flight than allowed, and backwards as soon as they can be."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionai.training.schedule import StageTurns, Turn


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1 << 30))
def test_every_microbatch_once_each_way_in_order_within_the_limit(microbatches: int, in_flight: int, seed: int) -> None:
    # Whichever of the open turns has its tensors first.
    draw, turns, taken = random.Random(seed), StageTurns(microbatches, in_flight), []
    held: set[int] = set()
    while not turns.complete:
        turn = draw.choice(turns.open())
        turns.done(turn)
        taken.append(turn)
        if turn.direction == "forward":
            held.add(turn.index)
        else:
            held.remove(turn.index)
        assert len(held) <= in_flight
    assert turns.open() == ()
    for direction in ("forward", "backward"):
        assert [turn.index for turn in taken if turn.direction == direction] == list(range(microbatches))


def taken_at_once(microbatches: int, in_flight: int, *, train: bool = True) -> list[Turn]:
    """Return the turns of a stage whose tensors are always there, forwards first as long as they may."""
    turns, taken = StageTurns(microbatches, in_flight, train=train), []
    while not turns.complete:
        taken.append(turns.open()[0])
        turns.done(taken[-1])
    return taken


def test_known_small_schedule() -> None:
    f, b = (lambda i: Turn("forward", i)), (lambda i: Turn("backward", i))
    assert taken_at_once(4, 2) == [f(0), f(1), b(0), f(2), b(1), f(3), b(2), b(3)]
    assert taken_at_once(3, 1, train=False) == [f(0), f(1), f(2)]


def test_a_forward_goes_first_and_a_backward_does_not_wait_for_it() -> None:
    turns = StageTurns(4, 3)
    turns.done(Turn("forward", 0))
    assert turns.open() == (Turn("forward", 1), Turn("backward", 0))
    turns.done(Turn("backward", 0))
    assert turns.open() == (Turn("forward", 1),)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="in_flight"):
        StageTurns(1, 0)
    with pytest.raises(ValueError, match="backward of microbatch 0 is not due"):
        StageTurns(1, 1).done(Turn("backward", 0))
