"""Which clusters sum their gradients with each other: the best ring of each set, and plans that use it."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from decoder_graph import GB, decoder, member
from planning_problems import TwoCities, check, task_of

from fusionai.scheduling.links import Floats
from fusionai.scheduling.planner import plan
from fusionai.scheduling.profile import Member
from fusionai.scheduling.search.chain import measured
from fusionai.scheduling.search.chain_solver import ChainSolver
from fusionai.scheduling.search.end_estimate import end_s
from fusionai.scheduling.search.rings import best_round_trips, rings, round_trip
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.selection import selected, weighed


@dataclass(frozen=True)
class Sites:
    """Fast links within each site of `size` machines, given ones between sites."""

    size: int
    between_bytes_per_s: Floats

    def bandwidths_bytes_per_s(self, sources: Any, targets: Any) -> Any:
        return self.between_bytes_per_s[np.asarray(sources) // self.size, np.asarray(targets) // self.size]

    def rtts_s(self, sources: Any, targets: Any) -> Any:
        same = np.asarray(sources) // self.size == np.asarray(targets) // self.size
        return np.where(same, 1e-4, 2e-3)


def sites(seed: int, count: int, size: int) -> tuple[list[Member], Sites]:
    draw = random.Random(seed)
    between = np.full((count, count), 2e9)
    for one, other in itertools.combinations(range(count), 2):
        between[one, other] = between[other, one] = 10 ** draw.uniform(5.5, 8)
    machines = [member(f"m{k}", gflops=draw.uniform(20, 200), memory_bytes=GB) for k in range(count * size)]
    return machines, Sites(size, between)


def work_of(seed: int, count: int, size: int) -> SegmentCosts:
    machines, links = sites(seed, count, size)
    return costs_in_segments(task_of(decoder(2), machines, links=links, microbatches=64))


def longest_hop(order: tuple[int, ...], byte_s: Floats) -> float:
    hops = [byte_s[one, other] for one, other in itertools.pairwise((*order, order[0])) if one != other]
    return max([*hops, *(byte_s[each, each] for each in order)])


@pytest.mark.parametrize("seed", range(6))
def test_round_trips_are_the_best_of_all_orders(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count = 6
    byte_s = draw.uniform(0.1, 1.0, (count, count))
    byte_s = np.maximum(byte_s, byte_s.T)
    byte_s[np.arange(count), np.arange(count)] = draw.uniform(0.0, 0.3, count)
    paths, trips = best_round_trips(byte_s)
    for chosen in range(1, 1 << count):
        inside = [knot for knot in range(count) if chosen >> knot & 1]
        best = min(longest_hop(order, byte_s) for order in itertools.permutations(inside))
        assert trips[chosen] == best
        found = tuple(int(each) for each in round_trip(chosen, paths, byte_s))
        assert sorted(found) == inside
        assert longest_hop(found, byte_s) == best


@pytest.mark.parametrize("seed", range(6))
def test_no_set_and_order_of_sites_is_faster(seed: int) -> None:
    # One machine of each site holds the whole model: every set of them in every order of the ring can be weighed.
    work = work_of(seed, 5, 2)
    chains = [measured(work, np.asarray([2 * k]), np.asarray([0, work.count]), 1.0, 64) for k in range(5)]
    orders = [each for count in range(1, 6) for each in itertools.permutations(range(5), count)]
    best_s = min(each.step_s for order in orders if (each := weighed(work, [chains[k] for k in order])))
    found = selected(work, chains)
    assert found is not None
    assert found.step_s == pytest.approx(best_s, rel=1e-6)


def test_rings_are_for_several_sites() -> None:
    work = costs_in_segments(task_of(decoder(2), [member(f"m{k}") for k in range(4)], microbatches=64))
    chains = [measured(work, np.asarray([k]), np.asarray([0, work.count]), 1.0, 64) for k in range(4)]
    assert rings(work, chains) == []


def test_many_sites_are_put_in_one_by_one() -> None:
    work = work_of(3, 20, 2)
    chains = [measured(work, np.asarray([2 * k]), np.asarray([0, work.count]), 1.0, 64) for k in range(20)]
    for ring in rings(work, chains):
        assert len(ring) == len(set(ring)) > 0
    found = selected(work, chains)
    by_speed = sorted(chains, key=lambda each: each.period_s)
    prefixes = [weighed(work, by_speed[:count]) for count in range(1, 21)]
    assert found is not None
    assert found.step_s <= min(each.step_s for each in prefixes if each)


def test_sites_that_a_good_link_joins_are_told_apart() -> None:
    # Louvain's communities join two of three sites; what is near within each is another question.
    between = np.asarray([[1.2e9, 9e8, 1e6], [9e8, 1.3e9, 1e6], [1e6, 1e6, 8e9]])
    work = costs_in_segments(task_of(decoder(2), [member(f"m{k}") for k in range(12)], links=Sites(4, between)))
    assert sorted(each.tolist() for each in work.near_clusters) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    cities = costs_in_segments(task_of(decoder(2), [member(f"m{k}") for k in range(300)], links=TwoCities(300)))
    assert [len(each) for each in cities.near_clusters] == [150, 150]


@pytest.mark.parametrize("seed", [0, 6, 14, 15])
def test_plans_are_as_fast_as_the_best_ring_of_sites(seed: int) -> None:
    machines, links = sites(seed, 6, 2)
    task = task_of(decoder(4), machines, links=links, microbatches=256)
    work = costs_in_segments(task)
    solver = ChainSolver(work)
    chains = [solver.solve(np.asarray([2 * k, 2 * k + 1]), 64, 1.0, 1e-3) for k in range(6)]
    best_s = np.inf
    for inside in (each for count in range(1, 7) for each in itertools.combinations(range(6), count)):
        for order in itertools.permutations(inside[1:]):
            found = weighed(work, [chain for k in (inside[0], *order) if (chain := chains[k])])
            if found is not None:
                best_s = min(best_s, max(found.step_s, found.pipelines_s + end_s(work, found.chains)))
    made = plan(task)
    check(task, made)
    assert made.predicted_step_s <= best_s * 1.02
