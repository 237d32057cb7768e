"""The planner against simple splits, DT-FM's grid, every possible plan of small pools, and the bound.

    python benchmarks/planners.py [--parts pools small bound scale] [--pools 24] [--small 200] [--workload gpt2-xl]
                                  [--json]

Training on random pools of 24 and 48 GPUs, RTX 4090 and RTX 2080 of the catalogue, in clusters: 1 to 10 Gbit/s within
one, 8 Mbit/s to 1 Gbit/s among them. All plans are predictions of the same estimator. A ratio is the baseline's step
over ours; a baseline that does not fit has none. Each setting differs from the baselines in other things:

* whole_pool: one pipeline of all machines on both sides, as FusionLLM compares. Order and cuts differ. The baselines
  have the machines cluster by cluster, in random order, or the fastest first.
* same_machines: our plan against simple cuts of its own pipelines, machines, order and microbatches. Only cuts differ.
* best_number: our plan against simple cuts of the best number of the fastest machines, of the pool or of a cluster.
* grid: our plan against DT-FM's grid of data-parallel pipelines over all machines, the best shape of it.
* everyone: our plan against one pipeline of all machines in the given order. Most of this ratio is leaving out.

`worst`, `median` and `best` are those of `over`, the setting whole_pool: it is the one that FusionLLM's figures are of.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from contenders.planners.genetic_order import genetic_order
from contenders.planners.grid_search import best_grid
from contenders.planners.one_chain import chain_outcome
from contenders.planners.proportional_splits import RULES, cheapest_prefix, cut_again
from contenders.planners.whole_pool import everyone_in_one_chain
from fusionai.errors import PlacementError
from fusionai.scheduling.evaluation import Evaluated
from fusionai.scheduling.links import Indices, PoolLinks
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Pool
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments
from planner_pools import WORKLOADS, Workload, clustered_links, equal_links, gpus, pool_of, simulated_step_s

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "scheduling"))

from decoder_graph import GB, SIZES, decoder, member
from every_plan_of_pipelines import best_single_step_s, best_step_of_several_s

PARTS = ("pools", "small", "bound", "scale")
ROUNDS = 64
"""Microbatches of a step on 24 and 48 GPUs; on more, for each machine."""

OVER = "whole_pool"


def timed(make: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what `make` makes, and the seconds it took by the clock and of a processor."""
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    made = make()
    return made, time.perf_counter() - start_s, time.process_time() - cpu_start_s


def step_of(found: Evaluated | None) -> float | None:
    """Return the seconds of a step, if there is a plan."""
    return None if found is None else found.step_s


def orders_of(work: SegmentCosts, seed: int) -> dict[str, Indices]:
    """Return the orders in which baselines take machines."""
    machines = work.problem.candidates
    return {
        "by cluster": machines,
        "random": np.random.default_rng(seed).permutation(machines),
        "fastest first": machines[np.argsort(work.whole_s[machines], kind="stable")],
    }


def baselines(work: SegmentCosts, made: Plan, seed: int) -> Iterator[tuple[str, str, float | None]]:
    """Yield each baseline's setting, its name and its step in seconds."""
    for name, rule in RULES.items():
        for order, machines in orders_of(work, seed).items():
            step_s = step_of(chain_outcome(work, machines, rule(work, machines)))
            yield OVER, f"{name}, {order}", step_s
            if order == "by cluster":
                yield "everyone", name, step_s
        yield "same_machines", name, step_of(cut_again(work, made, rule))
        yield "best_number", name, step_of(cheapest_prefix(work, rule))
    try:
        step_s = genetic_order(work.problem).predicted_step_s
    except PlacementError:
        step_s = None
    yield OVER, "genetic_order", step_s
    yield "grid", "DT-FM", step_of(best_grid(work))


def against_baselines(workload: Workload, pools: int) -> list[dict[str, Any]]:
    """Return, by pool, the baselines' steps over ours."""
    rows = []
    for seed in range(pools):
        members, links = pool_of(seed)
        task = workload.task(members, links, ROUNDS)
        made, _, cpu_s = timed(partial(plan, task))
        work = costs_in_segments(task)
        everyone = everyone_in_one_chain(work)
        ratios: dict[str, dict[str, float | None]] = defaultdict(dict)
        for setting, name, step_s in baselines(work, made, seed):
            ours_s = step_of(everyone) if setting == OVER else made.predicted_step_s
            ratios[setting][name] = None if step_s is None or ours_s is None else step_s / ours_s
        rows.append(
            {
                "pool": seed,
                "simulated_step_s": simulated_step_s(workload, made, members, links),
                "gpus": len(members),
                "clusters": len(links.between),
                "step_s": made.predicted_step_s,
                "whole_pool_step_s": step_of(everyone),
                "of_bound": made.bound_step_s / made.predicted_step_s,
                "pipelines": [len(each.stages) for each in made.pipelines],
                "ratios": ratios,
                "plan_cpu_s": cpu_s,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def spread(ratios: list[float | None]) -> dict[str, Any]:
    """Return the worst, median and best ratio, and how many baselines had a plan at all."""
    known = [each for each in ratios if each is not None]
    if not known:
        return {"worst": None, "median": None, "best": None, "of": len(ratios), "do_not_fit": len(ratios)}
    return {
        "worst": min(known),
        "median": statistics.median(known),
        "best": max(known),
        "of": len(ratios),
        "do_not_fit": len(ratios) - len(known),
    }


def by_setting(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread of each setting over pools: of all its baselines, of the best of them in each pool, of each."""
    found = {}
    for setting in rows[0]["ratios"]:
        by_pool = [row["ratios"][setting] for row in rows]
        best = [min((each for each in ratios.values() if each is not None), default=None) for ratios in by_pool]
        found[setting] = {
            **spread([ratio for ratios in by_pool for ratio in ratios.values()]),
            "best_baseline_of_each_pool": spread(best),
            "by_baseline": {name: spread([ratios[name] for ratios in by_pool]) for name in by_pool[0]},
        }
    return found


def small_pool(seed: int) -> TrainingProblem:
    """Return a task on 2 to 4 machines with uneven links, by its number."""
    draw = random.Random(seed)
    machines = draw.randint(2, 4)
    members = tuple(member(f"m{k}", gflops=draw.uniform(20, 200), memory_bytes=GB) for k in range(machines))
    links = {
        f"{one.peer}>{other.peer}": LinkProfile(10 ** draw.uniform(-4, -2), 10 ** draw.uniform(6, 9.5))
        for one, other in itertools.permutations(members, 2)
    }
    pool_links = PoolLinks(Pool(members, links), [each.peer for each in members])
    graph = decoder(draw.choice((1, 2, 3)), hidden=draw.choice((32, 64)))
    return Workload(graph, SIZES, "fp32").task(members, pool_links, draw.choice((1, 2, 4, 8)))


def small_pools(count: int) -> dict[str, Any]:
    """Return on how many small pools no single pipeline is faster than the plan, and no plan of several pipelines."""
    single = every = 0
    worse: dict[int, float] = {}
    for seed in range(count):
        task = small_pool(seed)
        made_s = plan(task).predicted_step_s * (1 - 1e-9)
        work = costs_in_segments(task)
        single_s = best_single_step_s(work)
        least_s = min(single_s, best_step_of_several_s(work, min(single_s, made_s)))
        single += made_s <= single_s
        every += made_s <= least_s
        if made_s > least_s:
            worse[seed] = made_s / least_s
    return {
        "optimal_small_pools": every,
        "optimal_against_single_pipelines": single,
        "small_pools": count,
        "times_the_optimum": worse,
    }


def of_bound(made: Plan) -> dict[str, Any]:
    """Return how far a plan is from its bound, and what takes the rest: shares of the step."""
    step_s = made.predicted_step_s
    slowest_s = max(each.predicted_s for each in made.pipelines)
    busy_s = [
        pipeline.microbatches * (stage.predicted.forward_s + stage.predicted.backward_s)
        for pipeline in made.pipelines
        for stage in pipeline.stages
    ]
    machines = len(busy_s) + len(made.left_out)
    return {
        "step_s": step_s,
        "bound_s": made.bound_step_s,
        "of_bound": made.bound_step_s / step_s,
        "end_of_step": made.end_of_step_s / step_s,
        "machines_at_work": sum(busy_s) / step_s / machines,
        "machines_left_out": len(made.left_out) / machines,
        "waiting_in_pipelines": (slowest_s * len(busy_s) - sum(busy_s)) / step_s / machines,
        "pipelines": len(made.pipelines),
        "longest": max(len(each.stages) for each in made.pipelines),
        "bottleneck": made.bottleneck,
    }


def against_bound(count: int) -> dict[str, Any]:
    """Return, by workload and links, how far plans for `count` machines are from the bound, and from the simulator."""
    found: dict[str, Any] = {}
    for name, make in WORKLOADS.items():
        workload = make()
        draw = random.Random(count)
        members = gpus(count, draw)
        clusters = clustered_links(count, count // 8, draw)
        for kind, links in (
            ("10 Gbit/s", equal_links(count, 10_000)),
            ("1 Gbit/s", equal_links(count, 1000)),
            ("clusters", clusters),
        ):
            made, wall_s, cpu_s = timed(partial(plan, workload.task(members, links, ROUNDS * count)))
            found[f"{name}, {kind}"] = {
                **of_bound(made),
                "simulated_step_s": simulated_step_s(workload, made, members, links),
                "plan_s": wall_s,
                "plan_cpu_s": cpu_s,
            }
            print(name, kind, json.dumps(found[f"{name}, {kind}"]), file=sys.stderr, flush=True)
    return found


def at_scale(workload: Workload, count: int) -> dict[str, Any]:
    """Return the planner's time and distance from the bound with equal 10 Gbit/s links, and with clusters."""
    found: dict[str, Any] = {}
    draw = random.Random(count)
    members = gpus(count, draw)
    clusters = clustered_links(count, max(2, min(24, count // 8)), draw)
    for name, links in (("fast", equal_links(count, 10_000)), ("clusters", clusters)):
        made, wall_s, cpu_s = timed(partial(plan, workload.task(members, links, ROUNDS * count)))
        found[name] = {"plan_s": wall_s, "plan_cpu_s": cpu_s, **of_bound(made)}
        print(count, name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and print one JSON object; progress goes to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pools", type=int, default=24)
    parser.add_argument("--small", type=int, default=200)
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="gpt2-xl")
    parser.add_argument("--json", action="store_true", help="print the object on one line")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]()
    report: dict[str, Any] = {"workload": options.workload}
    if "pools" in options.parts:
        rows = against_baselines(workload, options.pools)
        settings = by_setting(rows)
        report |= {"pools": rows, "by_setting": settings, "over": OVER}
        report |= {name: settings[OVER][name] for name in ("worst", "median", "best")}
    if "small" in options.parts:
        report |= small_pools(options.small)
    if "bound" in options.parts:
        report["bound_at_100"] = against_bound(100)
    if "scale" in options.parts:
        report["scale"] = {str(count): at_scale(workload, count) for count in (100, 1000, 10_000)}
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
