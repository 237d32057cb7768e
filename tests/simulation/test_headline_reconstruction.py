"""The closed formulas against the table that was worked out before this code existed, and against each other."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from fusionai.simulation.headline.reconstruction import (
    BERT_WITHOUT_HEAD,
    GPT3,
    LINKS,
    check,
    checks,
    partition,
    peak_tflops,
)

TOLERANCE = 0.03
"""Relative: the table has two digits, and does not say how fine its operators are."""

TABLE = {
    (GPT3.name, "inference"): (0.11, 0.82, 0.88, 0.88),
    (GPT3.name, "training, computing only"): (0.16, 0.84, 0.88, 0.88),
    (BERT_WITHOUT_HEAD.name, "inference"): (0.002, 0.011, 0.11, 0.68),
}


def test_the_table_is_reproduced() -> None:
    found = {(each.model, each.task, each.link_gbps): each.ratio for each in checks()}
    assert len(found) == 12
    for (model, task), ratios in TABLE.items():
        for gbps, ratio in zip(LINKS, ratios, strict=True):
            assert found[model, task, gbps] == pytest.approx(ratio, rel=TOLERANCE), (model, task, gbps)


def test_one_sequence_of_gpt3_at_1_gbps() -> None:
    found = check(GPT3, training=False, link_gbps=1.0)
    assert found.latency_s == pytest.approx(44.5, rel=0.01)
    assert found.reference_latency_s == pytest.approx(1.9, rel=0.03)


def test_peaks() -> None:
    assert peak_tflops("RTX 3080", 50) == pytest.approx(2975)
    assert peak_tflops("H100 PCIe", 4) == pytest.approx(3024)
    assert peak_tflops("H100 SXM", 4) == pytest.approx(3956)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_partition_has_a_smaller_bottleneck(stages: int) -> None:
    computing, receiving = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0], [2.0, 8.0, 1.0, 8.0, 2.0, 8.0, 0.0]

    def bottleneck(cuts: tuple[int, ...]) -> float:
        bounds = [0, *cuts, len(computing)]
        shares = [sum(computing[start:stop]) for start, stop in pairwise(bounds)]
        return max(*shares, *(receiving[cut - 1] for cut in cuts), 0.0)

    best = min(bottleneck(cuts) for count in range(stages) for cuts in combinations(range(1, len(computing)), count))
    assert bottleneck(tuple(partition(computing, receiving, stages))) == pytest.approx(best)


def test_all_machines_are_used_though_one_would_be_faster() -> None:
    assert partition([1.0, 1.0, 1.0], [50.0, 50.0, 0.0], 3) == [1, 2]
