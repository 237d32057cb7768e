"""1F1B turns: complete, in order, and never more in flight than allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionai.training.schedule import Turn, forward_only, one_forward_one_backward


@given(st.integers(1, 40), st.integers(1, 50))
def test_every_microbatch_once_each_way_in_order_within_the_limit(microbatches: int, in_flight: int) -> None:
    turns = one_forward_one_backward(microbatches, in_flight)
    forwards = [turn.index for turn in turns if turn.direction == "forward"]
    backwards = [turn.index for turn in turns if turn.direction == "backward"]
    assert forwards == backwards == list(range(microbatches))
    held, most = set(), 0
    for turn in turns:
        if turn.direction == "forward":
            held.add(turn.index)
        else:
            held.remove(turn.index)
        most = max(most, len(held))
    assert most == min(microbatches, in_flight)


def test_known_small_schedule() -> None:
    f, b = (lambda i: Turn("forward", i)), (lambda i: Turn("backward", i))
    assert one_forward_one_backward(4, 2) == (f(0), f(1), b(0), f(2), b(1), f(3), b(2), b(3))
    assert forward_only(2) == (f(0), f(1))


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="in_flight"):
        one_forward_one_backward(1, 0)
