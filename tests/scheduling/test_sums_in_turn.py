"""Turns in sums of gradients: no machine is in two at once, and nobody waits for a fixed order."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from fusionai.scheduling.sums_in_turn import begin_s


def drawn(seed: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    draw = random.Random(seed)
    machines = [np.asarray(draw.sample(range(6), draw.randint(1, 4))) for _ in range(draw.randint(1, 6))]
    ready = np.asarray([draw.choice((0.0, draw.uniform(0, 3))) for _ in machines])
    return ready, machines, np.asarray([draw.uniform(0.1, 2) for _ in machines])


def in_order(order: tuple[int, ...], ready: np.ndarray, machines: list[np.ndarray], seconds: np.ndarray) -> float:
    until = np.zeros(6)
    for each in order:
        until[machines[each]] = max(ready[each], until[machines[each]].max()) + seconds[each]
    return float(until.max())


@pytest.mark.parametrize("seed", range(20))
def test_turns_are_possible_and_near_the_best_of_all_orders(seed: int) -> None:
    ready, machines, seconds = drawn(seed)
    begin = begin_s(ready, machines, seconds)
    assert (begin >= ready).all()
    for one, other in itertools.combinations(range(len(machines)), 2):
        if set(machines[one].tolist()) & set(machines[other].tolist()):
            assert begin[one] + seconds[one] <= begin[other] or begin[other] + seconds[other] <= begin[one]
    ends = [in_order(order, ready, machines, seconds) for order in itertools.permutations(range(len(machines)))]
    assert min(ends) <= float((begin + seconds).max()) * (1 + 1e-12)
    assert float((begin + seconds).max()) <= 1.4 * min(ends)


def test_sums_of_staggered_stages_run_two_at_a_time() -> None:
    # One after the other, each would wait for the one before: six seconds.
    machines = [np.asarray([k, k + 1]) for k in range(6)]
    begin = begin_s(np.zeros(6), machines, np.ones(6))
    assert sorted(begin.tolist()) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_nothing_to_sum() -> None:
    assert begin_s(np.zeros(0), [], np.zeros(0)).tolist() == []
