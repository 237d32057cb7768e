"""The end of a step: planner and simulator agree on it, and the quick estimate is what it says."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from decoder_graph import decoder, member, pool
from training_problems import one_pipeline, problem_of

from fusionai.graph.cuts import cut_points
from fusionai.scheduling.end_of_step import GradientSum, committed_s, end_of_step, summed_s
from fusionai.scheduling.evaluation import evaluated_one
from fusionai.scheduling.links import Floats, PoolLinks
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Pool
from fusionai.scheduling.search.chain import measured
from fusionai.scheduling.search.end_estimate import end_s, estimated_sum_s, holders
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulator import simulate

OWNER = member("owner", gflops=50.0)
VOCABULARY, HIDDEN = 4096, 64
TABLE_BYTES = 4 * VOCABULARY * HIDDEN
GRAPH = decoder(4, hidden=HIDDEN, vocabulary=VOCABULARY, tied=True)
BYTES_PER_S, DELAY_S = 1e7, 0.02


def links_of(machines: Pool, source: str, target: str) -> LinkProfile:
    """As the planner has them: an open job without an owner's machine has a driver that costs nothing."""
    return machines.link(source, target) if source and target else LinkProfile(0.0, float("inf"))


@pytest.mark.parametrize("where", ["other machines", "the same machine", "the owner's machine"])
@pytest.mark.parametrize("with_owner", [True, False])
def test_tied_weights_within_a_pipeline(where: str, with_owner: bool) -> None:
    """The embedding and the head share a table: planner and simulator take the same for its gradients."""
    if where == "the owner's machine" and not with_owner:
        pytest.skip("a private job has an owner")
    machines = pool(*(member(name) for name in "ab"), owner=OWNER, rtt_s=2 * DELAY_S, bytes_per_s=BYTES_PER_S)
    private = where == "the owner's machine"
    if with_owner:
        problem = one_pipeline(GRAPH, machines, OWNER, private=private)
    else:
        links = PoolLinks(machines, [each.peer for each in machines.members])
        problem = problem_of(GRAPH, members=machines.members, links=links)
    middle = cut_points(GRAPH, problem.sizes)[3]
    owner = problem.owner_index
    if private:
        assert owner is not None
        made = evaluated_one(problem, [problem.front, problem.back], [owner, 0, owner], 8)
    elif where == "the same machine":
        made = evaluated_one(problem, [], [0], 8)
    else:
        made = evaluated_one(problem, [middle], [0, 1], 8)
    exchanged_s = TABLE_BYTES / BYTES_PER_S + DELAY_S if where == "other machines" else 0.0
    assert made.end.summed_s == pytest.approx(exchanged_s), "each holder sends the table whole to the other"
    reported_s = made.end.committed_s
    assert (reported_s > 2 * DELAY_S) == (with_owner), "a round trip to the driver, and the update"
    assert simulated_step_s(problem, made.plan(), machines) == pytest.approx(made.step_s, rel=1e-9)


def simulated_step_s(problem: TrainingProblem, made: object, machines: Pool) -> float:
    devices = {each.peer: each.device for each in (*machines.members, OWNER)}
    links = LinkRates(partial(links_of, machines))
    report = simulate(made, problem.graph, links, devices, Scenario(), precision="fp32", optimizer_states=2)  # type: ignore[arg-type]
    return report.step_s[0]


def test_sums_of_one_machine_take_turns() -> None:
    """Two tied weights between the same two machines share the link between them."""

    def rates(sources: object, targets: object) -> tuple[Floats, Floats]:
        return np.asarray([1e6, 2e6]), np.asarray([0.5, 0.5])

    sums = [GradientSum(("a", "b"), 10**6, one_pipeline=True), GradientSum(("a", "b"), 2 * 10**6, one_pipeline=True)]
    assert summed_s(sums, rates) == pytest.approx(1.5 + 2.5)
    assert summed_s(sums, rates, {"a": 1.0, "b": 7.0}) == pytest.approx(7.0 + 1.5 + 2.5)
    assert summed_s([], rates) == 0
    assert sums[0].sends() == [("a", "b", 10**6), ("b", "a", 10**6)]


def test_machines_that_cannot_be_linked_never_end() -> None:
    machines = pool(*(member(name, dialable=False) for name in "ab"), owner=OWNER)
    problem = one_pipeline(GRAPH, machines, OWNER)
    costs = costs_in_segments(problem)
    chain = measured(costs, np.asarray([0, 1]), np.asarray([0, 2, costs.count]), 1.0, 8)
    assert end_s(costs, [chain]) == float("inf")


@pytest.mark.parametrize("seed", range(12))
def test_the_quick_estimate_is_close_to_the_exact_end(seed: int) -> None:
    draw = random.Random(seed)
    members = tuple(member(f"m{k}", gflops=draw.uniform(20, 200)) for k in range(6))
    links = {
        f"{one.peer}>{other.peer}": LinkProfile(10 ** draw.uniform(-4, -2), 10 ** draw.uniform(6, 8))
        for one in members
        for other in members
        if one is not other
    }
    known = PoolLinks(Pool(members, links), [each.peer for each in members])
    problem = problem_of(replace_tied(seed), members=members, links=known)
    costs = costs_in_segments(problem)
    groups = [[0], [1, 2], [3, 4, 5]][: 1 + seed % 3] if seed % 4 else [[0, 1, 2, 3, 4, 5]]
    chains = [
        measured(costs, np.asarray(group), np.linspace(0, costs.count, len(group) + 1).astype(np.int64), 1.0, 8)
        for group in groups
    ]
    table = holders(costs, chains)
    exact = end_of_step(problem, costs.trained, table)
    estimate_s = estimated_sum_s(costs, table)
    if len(chains) == 1:
        assert estimate_s == exact.summed_s
    most_delay_s = max(each.rtt_s for each in links.values()) / 2
    assert estimate_s <= exact.summed_s + 2 * (2 * len(chains) - 1) * most_delay_s
    assert exact.committed_s == committed_s(problem, costs.trained, table)
    assert end_s(costs, chains) == exact.seconds


def replace_tied(seed: int) -> object:
    return decoder(4, hidden=HIDDEN, vocabulary=VOCABULARY, tied=bool(seed % 2))


def test_a_plan_is_reckoned_as_it_is_simulated() -> None:
    machines = pool(*(member(name, gflops=60) for name in "abc"), owner=OWNER, rtt_s=1e-3, bytes_per_s=1e8)
    for private in (False, True):
        problem = one_pipeline(GRAPH, machines, OWNER, private=private, compnodes=3)
        made = plan(problem)
        assert simulated_step_s(problem, made, machines) == pytest.approx(made.predicted_step_s, rel=1e-9)
        several = plan(replace(problem, limits=replace(problem.limits, compnodes=0, most_pipelines=None)))
        assert several.predicted_step_s <= made.predicted_step_s * (1 + 1e-9)
