"""Placement for serving on Helix's three published clusters, ours against what other systems do, by one simulator.

python benchmarks/serving_placement.py [--json]

Takes about ten minutes of one core. Every placement is evaluated by the same max-flow and simulated with the same
requests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
import transformers

from contenders.serving.helix_clusters import CLUSTERS, PublishedCluster, device_of
from contenders.serving.other_placements import PLACEMENTS, baseline_plan
from contenders.serving.requests import Lengths, offline, poisson
from contenders.serving.serving_simulator import simulate_serving
from fusionai.errors import PlacementError
from fusionai.graph.capture import capture_transformers
from fusionai.owner.model_configuration import MODEL_CLASSES
from fusionai.scheduling.serving.load import load_of
from fusionai.scheduling.serving.serving_estimator import range_times
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_model import ServingModel, serving_model
from fusionai.scheduling.serving.serving_plan import ServingPlan
from fusionai.scheduling.serving.serving_planner import plan_of_placement, plan_serving
from fusionai.scheduling.serving.serving_task import ServingTask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "scheduling"))

from serving_pools import gaps, latency_is_optimal

PUBLISHED: dict[str, Any] = tomllib.loads((Path(__file__).parent / "helix_published.toml").read_text(encoding="utf-8"))

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-30B": {
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_hidden_layers": 60,
        "num_attention_heads": 52,
        "num_key_value_heads": 52,
    },
    "LLaMA-2-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
REQUESTS = 8000
ONLINE_SHARE = 0.75
"""Of a plan's predicted throughput, in arrivals: as we understand Helix's evaluation."""


ONLINE_WARM_UP_S = 400.0
ONLINE = ("fusionai", "swarm", "separate", "helix_published")
"""Whose plans are also given requests that come one by one."""


def model_of(name: str) -> ServingModel:
    """Return a model of half-precision weights, captured on the meta device."""
    config = transformers.AutoConfig.for_model("llama", **_LLAMA, **MODELS[name])
    with torch.device("meta"):
        module = MODEL_CLASSES["causal"].from_config(config, dtype=torch.bfloat16)
    graph = capture_transformers(module, "causal", name=name).graph
    return serving_model(
        graph, lambda sequences, tokens: {s: (sequences, tokens)[axis] for s, (_, axis) in graph.symbols.items()}
    )


def published_plan(task: ServingTask, cluster: PublishedCluster) -> ServingPlan | None:
    """Return Helix's own placement of LLaMA-2-70B, routed by our max-flow."""
    if task.model.name != "LLaMA-2-70B":
        return None
    blocks = task.model.blocks
    shares = [
        HeldRange(stop + 1 + (stop == blocks), first + (first > 0), machine)
        for machine, (first, stop) in enumerate(PUBLISHED["placements"][cluster.name])
        if stop > first
    ]
    return plan_of_placement(Evaluator(task), shares, "helix_published")


def plans_of(task: ServingTask, cluster: PublishedCluster) -> list[ServingPlan]:
    """Return ours first, then everybody else's that is possible."""
    plans = [plan_serving(task)]
    for name in PLACEMENTS:
        try:
            plans.append(baseline_plan(task, name))
        except PlacementError as error:
            print(f"{cluster.name}, {task.model.name}, {name}: {error}", file=sys.stderr)
    published = published_plan(task, cluster)
    return plans if published is None else [*plans, published]


def row_of(
    task: ServingTask,
    cluster: PublishedCluster,
    plan: ServingPlan,
    lengths: list[tuple[int, int]],
    times: tuple[float, float],
) -> dict[str, Any]:
    """Simulate a plan offline and online."""
    until_s, warm_up_s = times
    begun_s = time.perf_counter()
    full = simulate_serving(task, plan, offline(lengths), until_s=until_s, warm_up_s=warm_up_s)
    online = online_of(task, plan, lengths, until_s - warm_up_s) if plan.planner in ONLINE else None
    return {
        "cluster": cluster.name,
        "model": task.model.name,
        "planner": plan.planner,
        "tokens_per_s_flow": plan.predicted_tokens_per_s,
        "tokens_per_s_ceiling": plan.ceiling_tokens_per_s,
        "tokens_per_s_bound": plan.bound_tokens_per_s,
        "tokens_per_s": full.tokens_per_s,
        "token_s_flow": plan.predicted_token_s,
        "token_s": full.token_latency.mean_s,
        "utilisation": statistics.fmean(each.utilisation for each in full.machines),
        "online": online,
        "machines": len(plan.shards),
        "left_out": len(plan.left_out),
        "bottleneck": plan.bottleneck,
        "plan_s": plan.planning_s,
        "simulation_s": time.perf_counter() - begun_s,
    }


def online_of(
    task: ServingTask, plan: ServingPlan, lengths: list[tuple[int, int]], measured_s: float
) -> dict[str, Any]:
    """Simulate requests that arrive at random times, measured once as many are underway as are going to be."""
    rate = ONLINE_SHARE * plan.predicted_tokens_per_s / task.load.output_tokens
    report = simulate_serving(
        task,
        plan,
        poisson(lengths, rate, seed=1),
        until_s=ONLINE_WARM_UP_S + measured_s,
        warm_up_s=ONLINE_WARM_UP_S,
    )
    prompt, token = report.prompt_latency, report.token_latency
    return {
        "offered_tokens_per_s": rate * task.load.output_tokens,
        "tokens_per_s": report.tokens_per_s,
        "prompt_s": [prompt.mean_s, prompt.p50_s, prompt.p95_s],
        "token_s": [token.mean_s, token.p50_s, token.p95_s],
    }


def compared(model: ServingModel, cluster: PublishedCluster, times: tuple[float, float]) -> list[dict[str, Any]]:
    """Return the rows of one model on one cluster, with ours over each."""
    lengths = Lengths().draw(REQUESTS, seed=0)
    task = ServingTask(
        model=model, members=cluster.members, links=cluster.links, owner=cluster.gateway, load=load_of(lengths)
    )
    rows = []
    for plan in plans_of(task, cluster):
        row = row_of(task, cluster, plan, lengths, times)
        ours = rows[0] if rows else row
        row["ours_over_it_flow"] = ours["tokens_per_s_flow"] / row["tokens_per_s_flow"]
        row["ours_over_it"] = ours["tokens_per_s"] / row["tokens_per_s"]
        published = PUBLISHED["tokens_per_s"].get(cluster.name, {}).get(model.name, {})
        name = "helix" if plan.planner == "helix_published" else plan.planner
        if name in published:
            row["published_tokens_per_s"] = published[name]
            row["published_helix_over_it"] = published["helix"] / published[name]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def latency_rows(model: ServingModel, cluster: PublishedCluster) -> dict[str, Any]:
    """Return the plan on which one stream is fastest."""
    task = ServingTask(
        model=model,
        members=cluster.members,
        links=cluster.links,
        owner=cluster.gateway,
        load=load_of(Lengths().draw(REQUESTS, seed=0)),
        objective="latency",
    )
    plan = plan_serving(task)
    alone = simulate_serving(task, plan, offline([(750, 240)]))
    return {
        "cluster": cluster.name,
        "model": model.name,
        "machines": len(plan.shards),
        "token_s": plan.predicted_token_s,
        "bound_token_s": plan.bound_token_s,
        "token_s_simulated": alone.token_latency.mean_s,
        "bottleneck": plan.bottleneck,
        "plan_s": plan.planning_s,
    }


def layer_times(model: ServingModel) -> list[dict[str, Any]]:
    """Return one layer's times as we assume them, beside those that Helix measured."""
    load = load_of([(1000, 2)])
    rows = []
    for gpu, measured in PUBLISHED["layer_ms"].items():
        times = range_times(model, device_of(gpu, 1), load, "bf16").at(1, 2)
        decode, prompt = float(times.pass_s(2.0)) * 1e3, float(times.prompt_least_s) * 1e3
        rows.append({"gpu": gpu, "decode_ms": decode, "prompt_ms": prompt, "measured": measured})
    return rows


def main() -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--until", type=float, default=300.0, help="seconds simulated")
    parser.add_argument("--warm-up", type=float, default=140.0, help="of them not measured")
    parser.add_argument("--small", type=int, default=50, help="random small pools that are searched whole")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    models = [model_of(name) for name in MODELS]
    rows = [
        row
        for model in reversed(models)
        for cluster in CLUSTERS
        for row in compared(model, cluster, (options.until, options.warm_up))
    ]
    found = gaps(range(options.small))
    report = {
        "rows": rows,
        "latency": [latency_rows(model, cluster) for cluster in CLUSTERS for model in models],
        "layer_ms": layer_times(models[-1]),
        "small_pools": options.small,
        "latency_optimal": sum(latency_is_optimal(seed) for seed in range(options.small)),
        "throughput_gaps": {"search": [gap for gap, _ in found], "planner": [gap for _, gap in found]},
    }
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
