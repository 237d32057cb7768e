"""Plans for equal machines: against the planner, the simulator, and what must be so."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from fusionai.owner.headline_models import captured
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.simulation.codecs import Dense, TopK
from fusionai.simulation.headline.card_clusters import Cluster, consumer, datacentre
from fusionai.simulation.headline.costs import ADAM_COPIES, Costs, costs_of, ranges_of
from fusionai.simulation.headline.plan_search import PlanSearch
from fusionai.simulation.headline.simulated_pipelines import best_worked, simulated_pipeline_s, simulated_s
from fusionai.simulation.headline.step_end_formulas import StepEndFormulas
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulator import simulate

SMALL = {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 1000}


@pytest.fixture(scope="module")
def training() -> Costs:
    return costs_of(captured("gpt2-xl", SMALL), "training")


@pytest.fixture(scope="module")
def inference(training: Costs) -> Costs:
    return costs_of(training.model, "inference")


def with_memory(cluster: Cluster, gigabytes: float) -> Cluster:
    return replace(cluster, hardware=msgspec.structs.replace(cluster.hardware, memory_bytes=int(gigabytes * 1e9)))


def on_equal_links(cluster: Cluster) -> tuple[tuple[Member, ...], Pool, LinkRates]:
    """Return machines, their links as the planner takes them, and the same with one uplink for each machine."""
    members = tuple(
        Member(peer=f"m{k}", name=f"m{k}", device=cluster.device, dialable=True) for k in range(cluster.count)
    )
    link = LinkProfile(rtt_s=2 * cluster.latency_s, bandwidth_bytes_per_s=cluster.bytes_per_s)
    names = [each.peer for each in members]
    pool = Pool(members, {f"{a}>{b}": link for a in names for b in names if a != b})
    uplinks = dict.fromkeys(names, cluster.bytes_per_s)
    return members, pool, LinkRates(pool.link, up_bytes_per_s=uplinks, down_bytes_per_s=uplinks)


@pytest.mark.parametrize(("mbps", "gigabytes"), [(100, 0.35), (1000, 0.35), (1000, 0.6), (10_000, 0.35)])
def test_not_slower_than_the_planner(training: Costs, mbps: float, gigabytes: float) -> None:
    """On the same links: the planner lets each link of a machine carry all that it can, a home has one uplink."""
    cluster = with_memory(consumer(mbps, count=12), gigabytes)
    searcher = PlanSearch(training, cluster)
    found, _ = best_worked(searcher, searcher.ranked(cluster, Dense(), 64, batches=(1,)), cluster, Dense())
    members, pool, links = on_equal_links(cluster)
    model = training.model
    made = plan(
        TrainingProblem(
            graph=model.graph,
            graph_hash="",
            sizes=model.sizes(1),
            microbatches=64,
            optimizer_states=ADAM_COPIES,
            precision="bf16",
            privacy="open",
            front=0,
            back=len(model.graph.nodes),
            members=tuple(members),
            links=PoolLinks(pool, [each.peer for each in members]),
        )
    )
    devices = {each.peer: each.device for each in members}
    theirs = simulate(
        made, model.graph, links, devices, Scenario(steps=1), precision="bf16", optimizer_states=ADAM_COPIES
    )
    assert found.stages > 1, "the memory was chosen so that no card holds it alone"
    # Its passes with uplinks shared, its own end of the step. It may use cards that are left over here.
    assert found.step_s <= 1.05 * (theirs.elapsed_s * theirs.passes_share + made.end_of_step_s)


def test_the_simulator_agrees(training: Costs) -> None:
    for mbps in (100, 1000, 10_000):
        cluster = with_memory(consumer(mbps, count=8), 0.3)
        found = PlanSearch(training, cluster).best(cluster, Dense(), 256, batches=(1, 2))
        assert found is not None
        assert found.stages > 1
        assert simulated_pipeline_s(found, cluster) == pytest.approx(found.pipeline_s, rel=0.25), mbps


def test_long_steps_are_worked_through_in_part(training: Costs) -> None:
    cluster = with_memory(consumer(1000, count=8), 0.3)
    searcher = PlanSearch(training, cluster)
    found = searcher.best(cluster, Dense(), 256, batches=(1,))
    assert found is not None
    assert found.microbatches > 200
    whole = simulated_s(found, cluster, found.microbatches)
    assert simulated_pipeline_s(found, cluster) == pytest.approx(whole, rel=0.01)


def test_costs_grow_along_a_line(training: Costs) -> None:
    device = consumer(100).device
    four = costs_of(replace(training.model, sizes=lambda batch: training.model.sizes(4 * batch)), "training")
    direct, along = ranges_of(four, device, 1), ranges_of(training, device, 4)
    upper = np.triu_indices(len(direct.seconds_PP), 1)
    assert along.seconds_PP[upper] == pytest.approx(direct.seconds_PP[upper], rel=1e-3)
    # Working space is the largest of several, each with a line of its own.
    assert along.fixed_bytes_PP[upper] == pytest.approx(direct.fixed_bytes_PP[upper], rel=0.05)
    assert along.forward_bytes_P == pytest.approx(direct.forward_bytes_P)


def test_a_model_that_fits_one_card_is_replicated_and_links_do_not_count(inference: Costs) -> None:
    plans = [PlanSearch(inference, each).best(each, Dense(), 512) for each in (consumer(10), consumer(10_000))]
    assert all(plan is not None and plan.stages == 1 and plan.pipelines == 50 for plan in plans)
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].step_s == plans[1].step_s


def test_the_sum_of_gradients_limits_replicas_and_larger_steps_spread_it(training: Costs) -> None:
    cluster = consumer(100)
    searcher = PlanSearch(training, cluster)
    small, large = (searcher.best(cluster, Dense(), samples) for samples in (512, 65536))
    assert small is not None
    assert large is not None
    assert (small.machines, small.sum_s) == (1, 0.0), "one card has nothing to sum"
    assert large.machines > 25
    assert large.sum_s > 1
    assert 65536 / large.step_s > 5 * 512 / small.step_s
    packed = searcher.best(cluster, TopK(ratio=100, value_bytes=2), 512)
    assert packed is not None
    assert packed.step_s < small.step_s


def test_the_heaviest_stage_or_tied_weights_limit_the_sum(training: Costs) -> None:
    cluster = consumer(100)
    last = len(training.one.positions) - 1
    assert training.tied_segments == (0, last - 1)
    assert training.tied_bytes == 1000 * 512 * 2
    weights = ranges_of(training, cluster.device, 1).weight_bytes_P
    end = StepEndFormulas(training, cluster, Dense(), weights)
    rate, delay_s, middle = 12.5e6, 20e-3, last // 2
    held = [float(weights[middle]), float(weights[last] - weights[middle])]
    exchange_s = training.tied_bytes / rate + delay_s
    pipelines = np.asarray([1, 2, 5])

    def copies_s(count: int, size: float) -> float:
        ring_s, gather_s = 2 * (count - 1) * (size / count / rate + delay_s), (count - 1) * (size / rate + delay_s)
        return min(ring_s, gather_s)

    expected = [max(copies_s(count, size) for size in held) + exchange_s for count in (1, 2, 5)]
    assert end.sum_s(pipelines, [0, middle, last]) == pytest.approx(expected)
    # One stage holds tied weights once.
    assert end.sum_s(pipelines, [0, last]) == pytest.approx(end.copies_s(pipelines, float(weights[last])))


def test_what_does_not_fit_says_what_is_missing(training: Costs) -> None:
    tiny = with_memory(consumer(1000, count=4), 0.1)
    searcher = PlanSearch(training, tiny)
    assert searcher.best(tiny, Dense(), 64) is None
    assert "needs" in searcher.missing(tiny)
    without = searcher.best(tiny, Dense(), 64, memory=False)
    assert without is not None
    assert without.pipelines == 1
    assert without.stages > 1


def test_one_sample_takes_longer_through_more_stages(inference: Costs) -> None:
    slow, (fast, _) = with_memory(consumer(100, count=8), 0.03), datacentre()
    searchers = PlanSearch(inference, slow), PlanSearch(inference, fast)
    plans = [each.best(cluster, Dense(), 512) for each, cluster in zip(searchers, (slow, fast), strict=True)]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].stages > 1
    latencies = [
        searcher.one_sample_s(plan, cluster, Dense())
        for searcher, plan, cluster in zip(searchers, plans, (slow, fast), strict=True)
        if plan is not None
    ]
    assert latencies[0] > latencies[1] + (plans[0].stages - 1) * slow.latency_s
