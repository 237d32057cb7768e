"""Chains that are polished: weighed as they are measured, never slower, and as fast as any in small cases."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_graph import decoder, member
from planning_problems import TwoCities, scarce, task_of

from contenders.planners.proportional_splits import RULES
from fusionai.scheduling.search.chain import Chain, measured
from fusionai.scheduling.search.chain_polish import _Scale, polished
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain


@pytest.mark.parametrize("seed", range(6))
def test_ways_are_weighed_as_chains_are_measured(seed: int) -> None:
    work = scarce(seed, 4, 6)
    machines, rounds = np.arange(4), work.problem.microbatches
    draw = np.random.default_rng(seed)
    inner = np.sort(np.stack([draw.choice(np.arange(1, work.count), 3, replace=False) for _ in range(20)]), axis=1)
    bounds_WB = np.concatenate([np.zeros((20, 1)), inner, np.full((20, 1), work.count)], axis=1).astype(np.int64)
    order_WM = np.stack([draw.permutation(4) for _ in range(20)])
    weighed = _Scale(work, machines, rounds, 0.0).seconds(bounds_WB, order_WM)
    for way in range(20):
        chain = measured(work, machines[order_WM[way]], bounds_WB[way], 1.0, rounds)
        assert weighed[way] == pytest.approx(chain.seconds(rounds))


@pytest.mark.parametrize("seed", range(8))
def test_a_polished_chain_is_never_slower(seed: int) -> None:
    work = scarce(seed, 5, 8)
    rounds = work.problem.microbatches
    for rule in RULES.values():
        machines = work.problem.candidates
        before = measured(work, machines, rule(work, machines), 1.0, rounds)
        after = polished(work, before, rounds)
        assert sorted(after.machines) == sorted(before.machines)
        assert after.seconds(rounds) <= before.seconds(rounds)


def test_the_holders_of_a_tied_weight_come_near_each_other() -> None:
    members = [member(f"m{k}", device="cuda:0") for k in range(4)]
    links = TwoCities(4, far_bytes_per_s=1e5)
    task = task_of(decoder(8, vocabulary=4096, tied=True), members, links=links, microbatches=2)
    work = costs_in_segments(task)
    chain = measured(work, np.arange(4), RULES["equal_layers"](work, np.arange(4)), 1.0, 2)
    better = polished(work, chain, 2)
    assert {chain.machines[0] < 2, chain.machines[-1] < 2} == {True, False}
    assert (better.machines[0] < 2) == (better.machines[-1] < 2)
    steps = [evaluated_chains(work, [worked_chain(work, each, 2)]).step_s for each in (chain, better)]
    assert steps[1] < 0.8 * steps[0]


def test_one_machine_has_nothing_to_polish() -> None:
    work = scarce(0, 2, 2)
    alone = Chain((0,), (0, work.count), 1.0, 1.0, 4)
    assert polished(work, alone, 4) is alone
