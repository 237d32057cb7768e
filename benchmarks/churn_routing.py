"""Replicated stages under churn: FusionAI's routing and recovery against an EMA-heap router (SWARM, Agora).

    python benchmarks/churn_routing.py [--pools 24] [--steps 30] [--json]
    python benchmarks/churn_routing.py --losses 8 --main-only [--pools 20] [--json]

Training GPT-2 medium (24 layers, 1,024 wide, one sequence of 1,024 tokens a microbatch, 256 of them in a step, fp32,
Adam) on random pools of 24 and 48 GPUs, RTX 4090 and RTX 2080 of the catalogue. Three pools of four lie in clusters (1
to 10 Gbit/s within one, 8 Mbit/s to 1 Gbit/s among them, as in `planners.py`), the fourth behind home links (100 Mbit/s
to 1 Gbit/s up and ten times that down, shared by all transfers of a machine).

Every variant runs the same steps on the same machines, links and outages. They differ in who routes (EMA heap or
expected finish), in what happens after a death, and in who takes over; all but `own_plan` in nothing else. What is
shown is the share of the baseline's time that FusionAI saves: 1 - ours / baseline.

Few steps on few machines end before anybody leaves, and then nothing differs. With `--losses` a run is as many steps,
up to ten times `--steps`, as it takes until so many holders are expected to have left; `--main-only` leaves out the
variants that say where the saving comes from.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from contenders.replicated.equal_stages import equal_stages
from contenders.replicated.replicated_planner import best_stages
from contenders.routed_simulation.recovery_rules import AGORA, FUSION, SWARM, RecoveryRules
from contenders.routed_simulation.routing_report import RoutingReport
from contenders.routed_simulation.routing_simulator import RoutingScenario, links_of_job, simulate_routing
from contenders.routers.balanced import BalancedConfig, BalancedMembership
from contenders.routers.ema_heap import EmaHeap
from contenders.routers.expected_finish import ExpectedFinish
from contenders.routers.membership import SwarmMembership
from contenders.routers.routed_job import RoutedJob
from contenders.routers.step_estimate import step_estimate
from fusionai.graph.capture import capture_transformers
from fusionai.graph.model import OpDag
from fusionai.scheduling.links import LinkModel
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.simulation.availability import Churn, Poisson, Scripted
from fusionai.simulation.link_rates import LinkRates
from planner_pools import MEGABIT, clustered_links, gpus

MICROBATCHES = 256
MEAN_DOWN_S = 120.0
RATES: dict[str, float | None] = {"none": None, "1 h": 3600.0, "20 min": 1200.0, "5 min": 300.0}
"""Mean time that a machine stays, by name; without churn first."""
FEW = ("none", "1 h")
"""Rates at which only the main variants run."""
MOST_STEPS = 10
"""Times `--steps` that a run may be longer for the sake of `--losses`."""
MOST_TIMES = 6.0
"""A run that takes longer than so many times FusionAI's without churn is given up, and counts as that long."""


@dataclass(frozen=True)
class Variant:
    """Who routes, what is done after a death, who decides who holds what."""

    ours_routes: bool
    rules: RecoveryRules
    ours_places: bool


VARIANTS = {
    "fusionai": Variant(True, FUSION, True),
    "ema_heap": Variant(False, SWARM, False),
    "agora": Variant(False, AGORA, False),
    "ema_heap_forgets": Variant(False, replace(SWARM, counted="forgotten"), False),
    "ema_heap_our_membership": Variant(False, SWARM, True),
    "ema_heap_our_recovery": Variant(False, FUSION, False),
    "ema_heap_our_recovery_and_membership": Variant(False, FUSION, True),
    "our_routing_only": Variant(True, SWARM, False),
}


@dataclass(frozen=True)
class HomeLinks:
    """What a machine sends goes through its uplink, what it gets through its downlink."""

    up: np.ndarray
    """Bytes per second by machine; ten times that down."""
    rtt: float = 0.03

    def bandwidths_bytes_per_s(self, sources: Any, targets: Any) -> Any:
        return np.minimum(self.up[sources], 10 * self.up[targets])

    def rtts_s(self, sources: Any, targets: Any) -> Any:
        return np.full(np.broadcast(sources, targets).shape, self.rtt)


def pool_of(seed: int) -> tuple[int, random.Random, LinkModel]:
    """Return the number of machines, the generator for what else is drawn, and the links."""
    draw = random.Random(seed)
    count = (24, 48)[seed % 2]
    if seed % 4 == 3:
        return count, draw, HomeLinks(MEGABIT * np.asarray([100 * 10 ** draw.random() for _ in range(count)]))
    return count, draw, clustered_links(count, draw.randint(2, 6), draw)


def links_of(job: RoutedJob, model: LinkModel) -> LinkRates:
    """Return the links to simulate; those of homes share up- and downlinks."""
    links = links_of_job(job)
    if not isinstance(model, HomeLinks):
        return links
    up = {peer: float(rate) for peer, rate in zip(job.peers, model.up, strict=True)}
    return LinkRates(links.link, up, {peer: 10 * rate for peer, rate in up.items()})


def run(job: RoutedJob, holders: Any, variant: Variant, links: LinkRates, scenario: RoutingScenario) -> RoutingReport:
    """Simulate one variant."""
    return simulate_routing(
        job,
        holders,
        ExpectedFinish(job) if variant.ours_routes else EmaHeap(),
        BalancedMembership(job, BalancedConfig(replays=variant.rules.roll_back == "if faster"))
        if variant.ours_places
        else SwarmMembership(job, sum(map(len, holders))),
        replace(scenario, rules=variant.rules),
        links=links,
    )


def one_pool(
    graph: OpDag,
    sizes: dict[str, int],
    seed: int,
    steps: int,
    losses: float,
    main_only: bool,
    rates: dict[str, float | None],
) -> dict[str, Any]:
    """Return what every variant takes at every churn rate on one pool."""
    count, draw, model = pool_of(seed)
    task = TrainingProblem(
        graph=graph,
        graph_hash="benchmark",
        sizes=sizes,
        microbatches=MICROBATCHES,
        optimizer_states=2,
        precision="fp32",
        members=gpus(count, draw),
        owner=None,
        links=model,
        privacy="open",
        front=0,
        back=len(graph.nodes),
    )
    began_s = time.perf_counter()
    work = costs_in_segments(task)
    _, holders, job = best_stages(work)
    plan_s = time.perf_counter() - began_s
    links = links_of(job, model)
    own_holders, own_job = equal_stages(work, job.stages)
    row: dict[str, Any] = {
        "pool": seed,
        "gpus": count,
        "links": "home" if isinstance(model, HomeLinks) else "clusters",
        "holders": [len(each) for each in holders],
        "plan_s": plan_s,
        "estimated_step_s": step_estimate(job, holders).step_s,
        "whole_pipelines_step_s": plan(task).predicted_step_s,
        "rates": {},
    }
    step_s = math.inf
    for rate, mean_up_s in rates.items():
        done = steps
        churn: Churn = Scripted()
        if mean_up_s is not None:
            churn = Poisson(seed=seed, mean_up_s=mean_up_s, mean_down_s=MEAN_DOWN_S)
            leaving_per_step = sum(map(len, holders)) * step_s / mean_up_s
            done = min(MOST_STEPS * steps, max(steps, math.ceil(losses / leaving_per_step)))
        longest_s = MOST_TIMES * done * step_s
        scenario = RoutingScenario(steps=done, churn=churn, longest_s=longest_s)
        found: dict[str, Any] = {}
        made = {name: partial(run, job, holders, each, links, scenario) for name, each in VARIANTS.items()}
        made["own_plan"] = partial(run, own_job, own_holders, VARIANTS["ema_heap"], links_of(own_job, model), scenario)
        if rate in FEW or main_only:
            made = {
                name: made[name]
                for name in ("fusionai", "ema_heap", "agora", "own_plan")
                if not main_only or name in ("fusionai", "ema_heap")
                if rate != "none" or name != "agora"
            }
        for name, simulate in made.items():
            report = simulate()
            if rate == "none" and name == "fusionai":
                step_s = report.elapsed_s / done
            found[name] = {
                "seconds": report.elapsed_s,
                "steps": done,
                "finished": report.finished,
                "step_s": statistics.median(report.step_s) if report.step_s else None,
                "deaths": report.deaths,
                "rolled_back": report.rolled_back,
                "recomputed_s": report.recomputed_s,
            }
        row["rates"][rate] = found
    ours = {rate: each["fusionai"]["seconds"] for rate, each in row["rates"].items()}
    print(seed, row["holders"], {rate: _shown(ours[rate], each) for rate, each in row["rates"].items()}, flush=True)
    return row


def _shown(ours_s: float, found: dict[str, Any]) -> str:
    return f"{ours_s:.0f} s; less than " + ", ".join(
        f"{name} {1 - ours_s / each['seconds']:.2f}" for name, each in found.items() if name != "fusionai"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by churn rate and baseline, the distribution of the time saved."""
    found: dict[str, Any] = {}
    for rate in rows[0]["rates"]:
        found[rate] = {}
        for name in rows[0]["rates"][rate]:
            if name == "fusionai":
                continue
            less = [1 - row["rates"][rate]["fusionai"]["seconds"] / row["rates"][rate][name]["seconds"] for row in rows]
            found[rate][name] = {
                "worst": min(less),
                "median": statistics.median(less),
                "best": max(less),
                "at_least_45_percent": sum(each >= 0.45 for each in less),
                "pools": len(less),
                "unfinished": sum(not row["rates"][rate][name]["finished"] for row in rows),
            }
        found[rate]["fusionai_unfinished"] = sum(not row["rates"][rate]["fusionai"]["finished"] for row in rows)
    return found


def main() -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pools", type=int, default=24)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--losses", type=float, default=0.0)
    parser.add_argument("--main-only", action="store_true")
    parser.add_argument("--rates", nargs="*", choices=list(RATES)[1:], default=list(RATES)[1:])
    options = parser.parse_args()
    rates = {name: RATES[name] for name in ("none", *options.rates)}
    with torch.device("meta"):
        net = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    graph = capture_transformers(net).graph
    sizes = {symbol: (1, 1024)[axis] for symbol, (_, axis) in graph.symbols.items()}
    rows = []
    for seed in range(options.first, options.first + options.pools):
        rows.append(one_pool(graph, sizes, seed, options.steps, options.losses, options.main_only, rates))
    replicated = [row["whole_pipelines_step_s"] / row["rates"]["none"]["fusionai"]["step_s"] for row in rows]
    accuracy = [row["estimated_step_s"] / row["rates"]["none"]["fusionai"]["step_s"] for row in rows]
    report = {
        "pools": rows,
        "less_time": summary(rows),
        "whole_pipelines_over_replicated": {
            "worst": min(replicated),
            "median": statistics.median(replicated),
            "best": max(replicated),
        },
        "estimated_over_simulated": {
            "least": min(accuracy),
            "median": statistics.median(accuracy),
            "most": max(accuracy),
        },
    }
    print(json.dumps(report) if options.json else json.dumps({**report, "pools": len(rows)}, indent=2))


if __name__ == "__main__":
    main()
