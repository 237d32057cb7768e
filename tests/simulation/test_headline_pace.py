"""The closed form of a pipeline's pace, and the cuts found with it: against executed schedules and all partitions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest

from fusionai.scheduling.links import Floats
from fusionai.scheduling.pipeline import Edge, StageTimes, pipeline_times
from fusionai.simulation.headline.cutting import bounds_of, narrow_positions
from fusionai.simulation.headline.pace import CostLine, PipelinePace, pace, with_more_in_flight

MANY = 1000


def ranges(parts: Floats) -> Floats:
    """Return sums over [i, j), infinite where the range is empty."""
    total = np.concatenate([[0.0], np.cumsum(parts)])
    return np.where(np.tri(len(total), dtype=bool), np.inf, total[None] - total[:, None])


def random_line(rng: np.random.Generator, segments: int) -> CostLine:
    backward = rng.uniform(1, 4, segments)
    crossing = rng.choice([1.0, 1.0, 1.0, 3.0], segments + 1) * rng.uniform(0.05, 3)
    crossing[[0, -1]] = 0.0
    return CostLine(
        forward_s_PP=ranges(rng.uniform(0.5, 2, segments)),
        backward_s_PP=ranges(backward),
        deferred_s_PP=ranges(backward * rng.uniform(0, 0.5)),
        out_s_P=crossing,
        back_s_P=crossing.copy(),
        delay_s=float(rng.uniform(0, 4)),
        weight_bytes_P=np.arange(segments + 1.0),
        fixed_bytes_PP=ranges(rng.uniform(1, 2, segments)),
        flight_bytes_PP=ranges(rng.uniform(0.2, 1, segments)),
        budget_bytes=float(rng.uniform(5, 14)),
    )


def lines(count: int) -> Iterator[tuple[CostLine, int]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield random_line(rng, int(rng.integers(5, 11))), int(rng.integers(2, 5))


def found(line: CostLine, stages: int) -> list[list[int]]:
    everywhere = np.ones(len(line.out_s_P), dtype=bool)
    ways = (narrow_positions(line, stages), everywhere)
    tried = (bounds_of(line, stages, allowed, microbatches=MANY) for allowed in ways)
    return [bounds for bounds in tried if bounds is not None]


def least_period_s(line: CostLine, stages: int) -> float:
    """Return the least period of all partitions; infinite if none fits."""
    last, best_s = len(line.out_s_P) - 1, math.inf
    for count in range(stages):
        for cuts in combinations(range(1, last), count):
            bounds = [0, *cuts, last]
            need = [line.fixed_bytes_PP[a, b] + line.flight_bytes_PP[a, b] for a, b in pairwise(bounds)]
            if max(need) <= line.budget_bytes:
                best_s = min(best_s, pace(line, bounds).period_s)
    return best_s


def test_cuts_against_all_partitions() -> None:
    ratios = []
    for line, stages in lines(200):
        least_s, tried = least_period_s(line, stages), found(line, stages)
        assert bool(tried) == math.isfinite(least_s), "what fits is found"
        if tried:
            ratios.append(min(pace(line, bounds).period_s for bounds in tried) / least_s)
    assert len(ratios) > 100
    # Stages are laid as long as they can be, which is not always best.
    assert np.mean(np.asarray(ratios) <= 1.02) > 0.95
    assert max(ratios) < 1.6


def executed_s(line: CostLine, bounds: list[int], at: PipelinePace) -> float:
    """Return the seconds between microbatches of the schedule, each link by itself."""
    seconds = zip(at.forward_s, at.backward_s, at.in_flight, at.deferred_s, strict=True)
    stages = [StageTimes(str(place), *each) for place, each in enumerate(seconds)]
    edges = [
        Edge(place, place + 1, float(line.out_s_P[cut]), float(line.back_s_P[cut]), line.delay_s / 2)
        for place, cut in enumerate(bounds[1:-1])
    ]
    short, long = (pipeline_times(stages, edges, count).makespan_s for count in (100, 200))
    return (long - short) / 100


def executed_over_period() -> list[float]:
    """Return, for random lines that fit, the executed schedule's seconds a microbatch over the period's."""
    ratios = []
    for line, stages in lines(100):
        for bounds in found(line, stages)[:1]:
            at = pace(line, bounds)
            ratios.append(executed_s(line, bounds, at) / at.period_s)
    return ratios


def test_the_period_against_executed_schedules() -> None:
    ratios = executed_over_period()
    # Links that are not shared spare the waiting for an uplink, and the busiest of them carries one way only.
    assert np.median(ratios) == pytest.approx(1, abs=0.01)
    assert min(ratios) > 0.5


@pytest.mark.xfail(
    strict=True,
    reason="1 of 87 schedules is 7 % slower: where memory allows no spare microbatch, a backward that has begun makes a"
    " forward wait that arrives a moment later (decision 14)",
)
def test_no_executed_schedule_is_slower_than_its_period() -> None:
    assert max(executed_over_period()) < 1.01


def test_memory_is_kept_whatever_is_in_flight() -> None:
    limited = more = 0
    for line, stages in lines(100):
        for bounds in found(line, stages):
            at = pace(line, bounds)
            ways = with_more_in_flight(line, bounds, at)
            limited += at.limit.startswith("memory")
            more += len(ways)
            for way in (at.in_flight, *ways):
                assert sorted(way, reverse=True) == list(way)
                for (a, b), held in zip(pairwise(bounds), way, strict=True):
                    assert line.fixed_bytes_PP[a, b] + held * line.flight_bytes_PP[a, b] <= line.budget_bytes
    assert limited > 10
    assert more > 10


def test_heavy_stages_are_refused() -> None:
    line = random_line(np.random.default_rng(1), 8)
    everywhere = np.ones(9, dtype=bool)
    bounds = bounds_of(line, 8, everywhere, microbatches=MANY, most_weight_bytes=1.5)
    assert bounds is None or max(np.diff(bounds)) == 1
    assert bounds_of(line, 8, everywhere, microbatches=MANY, most_weight_bytes=0.5) is None
