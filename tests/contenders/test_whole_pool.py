"""The contender that puts every machine into one pipeline: it takes all of them, and beats simple splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from decoder_graph import decoder, member
from every_plan_of_pipelines import chains_of
from planning_problems import scarce, task_of

from contenders.planners.one_chain import chain_outcome
from contenders.planners.proportional_splits import RULES
from contenders.planners.whole_pool import everyone_in_one_chain
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain


class TestEveryoneInOneChain:
    def test_is_near_the_best_of_all_orders_and_cuts(self) -> None:
        ratios = []
        for seed in range(8):
            work = scarce(seed, 3, 2, tied=bool(seed % 2))
            rounds = work.problem.microbatches
            everyone = (each for each in chains_of(work, 3) if len(each.machines) == 3)
            steps = [
                evaluated_chains(work, [made]).step_s
                for each in everyone
                if (made := worked_chain(work, each, rounds)).possible
            ]
            found = everyone_in_one_chain(work)
            assert found is not None
            ratios.append(found.step_s / min(steps))
        # Order and cuts are changed one at a time, so a search may end where only both together would help.
        assert np.median(ratios) <= 1.01, ratios
        assert max(ratios) <= 1.35, ratios

    @pytest.mark.parametrize("seed", range(6))
    def test_takes_all_and_is_faster_than_simple_cuts(self, seed: int) -> None:
        work = scarce(seed, 8, 12)
        found = everyone_in_one_chain(work)
        assert found is not None
        (made,) = found.pipelines
        assert sorted(made.choice.machines) == list(range(8))
        for rule, machines in itertools.product(RULES.values(), (np.arange(8), np.arange(8)[::-1])):
            simple = chain_outcome(work, machines, rule(work, machines))
            assert simple is None or found.step_s <= simple.step_s

    def test_more_machines_than_segments_have_no_chain(self) -> None:
        work = costs_in_segments(task_of(decoder(1), [member(f"m{k}") for k in range(60)]))
        assert everyone_in_one_chain(work) is None
