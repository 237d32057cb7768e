"""The planner of swarms against simple splits, against every possible plan of small pools, and against the bound.

    python benchmarks/planners.py [--pools 20] [--small 200] [--json]

Training GPT-2 XL (48 layers, 1,600 wide, one sequence of 1,024 tokens a microbatch, fp32, Adam) on random pools of 24
and 48 GPUs, RTX 4090 and RTX 2080 of the catalogue, in clusters: 1 to 10 Gbit/s within one, 8 Mbit/s to 1 Gbit/s among
them. Machines are given cluster by cluster, so baselines cross slow links no more often than they must. All plans are
predictions of the same estimator. A ratio is the baseline's step over the planner's; a baseline that does
not fit has none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fusionai.errors import PlacementError
from fusionai.graph.capture import capture_transformers
from fusionai.graph.model import OpDag
from fusionai.scheduling.baselines.genetic_order import genetic_order
from fusionai.scheduling.baselines.proportional_splits import equal_compute, equal_layers, memory_proportional
from fusionai.scheduling.links import LinkModel, PoolLinks
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.scheduling.swarm.chain import Chain
from fusionai.scheduling.swarm.outcome import outcome
from fusionai.scheduling.swarm.planner import plan
from fusionai.scheduling.swarm.running import run
from fusionai.scheduling.swarm.task import SwarmTask
from fusionai.scheduling.swarm.work import make_work
from fusionai.simulation.hardware.catalogue import lookup
from fusionai.simulation.hardware.efficiency import profile_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "scheduling"))

from decoder_graph import GB, SIZES, decoder, member

BASELINES = {
    "equal_layers": equal_layers,
    "equal_compute": equal_compute,
    "memory_proportional": memory_proportional,
    "genetic_order": genetic_order,
}
MEGABIT = 125_000.0
GPUS = ("RTX 4090", "RTX 2080")


@dataclass(frozen=True)
class ClusteredLinks:
    """Equal links within each cluster, and between any two clusters."""

    cluster: np.ndarray
    between: np.ndarray
    """Bytes per second by two clusters."""
    rtt: np.ndarray

    def bandwidths_bytes_per_s(self, sources: Any, targets: Any) -> Any:
        return self.between[self.cluster[sources], self.cluster[targets]]

    def rtts_s(self, sources: Any, targets: Any) -> Any:
        return self.rtt[self.cluster[sources], self.cluster[targets]]


def gpus(count: int, draw: random.Random) -> tuple[Member, ...]:
    """Return GPUs of mixed speed, in no order."""
    profiles = {name: profile_of(lookup(name)) for name in GPUS}
    kinds = [draw.choice(GPUS) for _ in range(count)]
    return tuple(Member(f"p{k}", f"{kind} {k}", profiles[kind], (), True) for k, kind in enumerate(kinds))


def clustered_links(count: int, clusters: int, draw: random.Random) -> ClusteredLinks:
    """Return links of 8 Mbit/s to 10 Gbit/s; machines of a cluster are next to each other in the given order."""
    between = np.zeros((clusters, clusters))
    rtt = np.zeros((clusters, clusters))
    for one, other in itertools.combinations_with_replacement(range(clusters), 2):
        low, high = (1000.0, 10_000.0) if one == other else (8.0, 1000.0)
        between[one, other] = between[other, one] = MEGABIT * low * (high / low) ** draw.random()
        rtt[one, other] = rtt[other, one] = 5e-4 if one == other else draw.uniform(0.01, 0.1)
    return ClusteredLinks(np.asarray(sorted(draw.randrange(clusters) for _ in range(count))), between, rtt)


def task_of(
    graph: OpDag, sizes: dict[str, int], members: tuple[Member, ...], links: LinkModel, rounds: int
) -> SwarmTask:
    """Return an open job with Adam."""
    return SwarmTask(
        graph=graph,
        graph_hash="benchmark",
        sizes=sizes,
        microbatches=rounds,
        optimizer_states=2,
        precision="fp32",
        members=members,
        owner=None,
        links=links,
        privacy="open",
        front=0,
        back=len(graph.nodes),
    )


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `make` makes and the seconds it took."""
    start_s = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start_s


def against_baselines(graph: OpDag, sizes: dict[str, int], pools: int) -> list[dict[str, Any]]:
    """Return, by pool, the baselines' steps over the planner's."""
    rows = []
    for seed in range(pools):
        draw = random.Random(seed)
        count = (24, 48)[seed % 2]
        links = clustered_links(count, draw.randint(2, 6), draw)
        task = task_of(graph, sizes, gpus(count, draw), links, 64)
        made, seconds = timed(partial(plan, task))
        ratios: dict[str, float | None] = {}
        for name, baseline in BASELINES.items():
            try:
                ratios[name] = baseline(task).predicted_step_s / made.predicted_step_s
            except PlacementError:
                ratios[name] = None
        rows.append(
            {
                "pool": seed,
                "gpus": count,
                "step_s": made.predicted_step_s,
                "of_bound": made.bound_step_s / made.predicted_step_s,
                "pipelines": [len(each.stages) for each in made.pipelines],
                "ratios": ratios,
                "plan_s": seconds,
            }
        )
        print(rows[-1], flush=True)
    return rows


def optimal_small_pools(count: int) -> int:
    """Return on how many random pools of 2 to 4 machines no single pipeline is faster than the plan."""
    optimal = 0
    for seed in range(count):
        draw = random.Random(seed)
        machines = draw.randint(2, 4)
        members = tuple(member(f"m{k}", gflops=draw.uniform(20, 200), memory_bytes=GB) for k in range(machines))
        links = {
            f"{one.peer}>{other.peer}": LinkProfile(10 ** draw.uniform(-4, -2), 10 ** draw.uniform(6, 9.5))
            for one, other in itertools.permutations(members, 2)
        }
        pool_links = PoolLinks(Pool(members, links), [each.peer for each in members])
        graph = decoder(draw.choice((1, 2, 3)), hidden=draw.choice((32, 64)))
        rounds = draw.choice((1, 2, 4, 8))
        task = task_of(graph, SIZES, members, pool_links, rounds)
        work = make_work(task)
        best = min(
            outcome(work, [run(work, Chain(order, (0, *inner, work.count), 0.0, 0.0, rounds), rounds)]).step_s
            for stages in range(1, min(machines, work.count) + 1)
            for order in itertools.permutations(range(machines), stages)
            for inner in itertools.combinations(range(1, work.count), stages - 1)
        )
        optimal += plan(task).predicted_step_s <= best * (1 + 1e-9)
    return optimal


def at_scale(graph: OpDag, sizes: dict[str, int], count: int, rounds: int) -> dict[str, Any]:
    """Return the planner's time and distance from the bound with equal 10 Gbit/s links, and with clusters."""
    found: dict[str, Any] = {}
    draw = random.Random(count)
    members = gpus(count, draw)
    fast = ClusteredLinks(np.zeros(count, dtype=np.int64), np.full((1, 1), 10_000 * MEGABIT), np.full((1, 1), 5e-4))
    for name, links in (("fast", fast), ("clusters", clustered_links(count, max(2, min(24, count // 8)), draw))):
        task = task_of(graph, sizes, members, links, rounds)
        made, seconds = timed(partial(plan, task))
        found[name] = {
            "plan_s": seconds,
            "of_bound": made.bound_step_s / made.predicted_step_s,
            "pipelines": len(made.pipelines),
            "left_out": len(made.left_out),
            "bottleneck": made.bottleneck,
        }
        print(count, name, found[name], flush=True)
    return found


def main() -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pools", type=int, default=20)
    parser.add_argument("--small", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
    graph = capture_transformers(model).graph
    sizes = {symbol: (1, 1024)[axis] for symbol, (_, axis) in graph.symbols.items()}
    rows = against_baselines(graph, sizes, options.pools)
    ratios = [ratio for row in rows for ratio in row["ratios"].values() if ratio is not None]
    scale = {str(count): at_scale(graph, sizes, count, 64 * count) for count in (100, 1000, 10_000)}
    report = {
        "pools": rows,
        "worst": min(ratios),
        "median": statistics.median(ratios),
        "best": max(ratios),
        "scale": scale,
        "optimal_small_pools": optimal_small_pools(options.small),
        "small_pools": options.small,
    }
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
