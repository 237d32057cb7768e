"""Re-planning after a machine was throttled: keeping the plan, planning afresh, and planning with the bytes to move.

    python benchmarks/sticky.py [--pools 20] [--json]

Training GPT-2 medium (24 layers, 1,024 wide, one sequence of 1,024 tokens a microbatch, 32 of them a step, fp32, Adam,
head and embedding apart) on random pools of 4 to 10 GPUs of the catalogue, an RTX 4090, 3080 or 2080 each, that offer
6 GB, so that several are needed. Links have 500 Mbit/s to 10 Gbit/s. The plan is made for the healthy pool; then one
machine of it becomes 1.5 to 4 times slower, and 10, 100 or 1,000 steps are left. All seconds are predictions of the
planner's own estimator. The fresh plan is the planner's for the throttled pool, wherever the weights lie; its bytes
count in its total.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from itertools import permutations
from typing import Any

import msgspec
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fusionai.graph.capture import capture_transformers
from fusionai.graph.cuts import cut
from fusionai.graph.model import OpDag, WeightKey
from fusionai.scheduling.evaluation import evaluated_again
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import PlanLimits, TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.scheduling.replanning import replanned
from fusionai.scheduling.transfers import TransferSchedule, holders_of, loads_of, state_bytes
from fusionai.simulation.hardware.catalogue import lookup
from fusionai.simulation.hardware.efficiency import profile_of
from fusionai.training.corrections import corrected

GPUS = ("RTX 4090", "RTX 3080", "RTX 2080")
MEGABIT = 125_000.0
OFFERED_BYTES = 6 * 10**9
HORIZONS = (10, 100, 1000)
MICROBATCHES = 32
OPTIMIZER_STATES = 2


def random_pool(draw: random.Random) -> tuple[Pool, Member]:
    """Return a pool and the owner's machine, which computes nothing here."""
    profiles = {name: msgspec.structs.replace(profile_of(lookup(name)), memory_bytes=OFFERED_BYTES) for name in GPUS}
    kinds = [draw.choice(GPUS) for _ in range(draw.randint(4, 10))]
    members = tuple(Member(f"p{k}", f"{kind} {k}", profiles[kind], (), True) for k, kind in enumerate(kinds))
    owner = Member("owner", "owner", profiles["RTX 2080"], (), True)
    rates = {each.peer: MEGABIT * 10 ** draw.uniform(2.7, 4) for each in (*members, owner)}
    links = {
        f"{one}>{other}": LinkProfile(draw.uniform(0.001, 0.01), min(rates[one], rates[other]))
        for one, other in permutations(rates, 2)
    }
    return Pool(members, links), owner


def throttled(pool: Pool, peer: str, factor: float) -> Pool:
    """Return the pool with one machine slower."""
    members = tuple(
        msgspec.structs.replace(each, device=corrected(each.device, factor)) if each.peer == peer else each
        for each in pool.members
    )
    return msgspec.structs.replace(pool, members=members)


def weights_of(graph: OpDag, made: Plan) -> dict[str, set[WeightKey]]:
    """Return the weights that each machine holds."""
    held: dict[str, set[WeightKey]] = {}
    for subdag, stage in zip(cut(graph, made.cuts), made.stages, strict=True):
        held.setdefault(stage.peer, set()).update(weight.key for weight in subdag.weights)
    return held


def one_pool(graph: OpDag, sizes: dict[str, int], seed: int) -> list[dict[str, Any]]:
    """Return a row for each number of steps left."""
    draw = random.Random(seed)
    healthy, owner = random_pool(draw)
    job = TrainingProblem(
        graph=graph,
        graph_hash="benchmark",
        sizes=sizes,
        microbatches=MICROBATCHES,
        optimizer_states=OPTIMIZER_STATES,
        precision="fp32",
        privacy="open",
        front=0,
        back=len(graph.nodes),
        limits=PlanLimits(most_pipelines=1),
    )
    running = plan(job.on_pool(healthy, owner))
    victim, factor = draw.choice(running.stages).peer, draw.uniform(1.5, 4)
    pool = throttled(healthy, victim, factor)
    problem = job.on_pool(pool, owner)
    keep_s = evaluated_again(problem, running).step_s
    start_s = time.perf_counter()
    fresh = plan(problem)
    fresh_plan_s = time.perf_counter() - start_s
    transfers = TransferSchedule(problem)
    nbytes = state_bytes(graph, sizes, OPTIMIZER_STATES)
    fresh_moves = transfers.moves(holders_of(weights_of(graph, running)), weights_of(graph, fresh), nbytes)
    fresh_move_s = transfers.moves_s(loads_of(fresh_moves))
    rows = []
    for steps_left in HORIZONS:
        start_s = time.perf_counter()
        made = replanned(problem, running, steps_left)
        sticky_plan_s = time.perf_counter() - start_s
        sticky_s, sticky_bytes, sticky_move_s = keep_s, 0, 0.0
        if made is not None:
            sticky_s, sticky_move_s = made.plan.predicted_step_s, made.move_s
            sticky_bytes = sum(move.nbytes for move in made.moves)
        rows.append(
            {
                "pool": seed,
                "machines": len(pool.members),
                "stages": len(running.stages),
                "factor": factor,
                "steps_left": steps_left,
                "kept": made is None,
                "step_s": {"healthy": running.predicted_step_s, "keep": keep_s, "fresh": fresh.predicted_step_s}
                | {"sticky": sticky_s},
                "moved_bytes": {"fresh": sum(move.nbytes for move in fresh_moves), "sticky": sticky_bytes},
                "move_s": {"fresh": fresh_move_s, "sticky": sticky_move_s},
                "total_s": {
                    "keep": steps_left * keep_s,
                    "fresh": steps_left * fresh.predicted_step_s + fresh_move_s,
                    "sticky": steps_left * sticky_s + sticky_move_s,
                },
                "plan_s": {"fresh": fresh_plan_s, "sticky": sticky_plan_s},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over pools: step times against the healthy plan's, bytes, and totals against the sticky one."""

    def over(row: dict[str, Any], what: str, one: str, other: str) -> float:
        return float(row[what][one] / row[what][other])

    return {
        "kept": sum(row["kept"] for row in rows),
        "pools": len(rows),
        "step_over_healthy": {
            name: statistics.median(over(row, "step_s", name, "healthy") for row in rows)
            for name in ("keep", "fresh", "sticky")
        },
        "moved_bytes": {
            name: statistics.median(row["moved_bytes"][name] for row in rows) for name in ("fresh", "sticky")
        },
        "total_over_sticky": {
            name: {
                "worst": min(ratios),
                "median": statistics.median(ratios),
                "best": max(ratios),
            }
            for name in ("keep", "fresh")
            for ratios in ([over(row, "total_s", name, "sticky") for row in rows],)
        },
        "plan_s": {
            name: {
                "median": statistics.median(row["plan_s"][name] for row in rows),
                "worst": max(row["plan_s"][name] for row in rows),
            }
            for name in ("fresh", "sticky")
        },
    }


def main() -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pools", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16, tie_word_embeddings=False))
    graph = capture_transformers(model).graph
    sizes = {symbol: (1, 1024)[axis] for symbol, (_, axis) in graph.symbols.items()}
    rows = [row for seed in range(options.pools) for row in one_pool(graph, sizes, seed)]
    report = {
        "rows": rows,
        "by_steps_left": {
            str(steps): summary([row for row in rows if row["steps_left"] == steps]) for steps in HORIZONS
        },
    }
    print(json.dumps(report) if options.json else json.dumps(report["by_steps_left"], indent=2))


if __name__ == "__main__":
    main()
