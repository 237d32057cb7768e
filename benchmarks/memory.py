"""Peak memory of compnodes against what the estimator says, over widths, batches and lengths.

    python benchmarks/memory.py [--json]

A Llama of 8 layers is trained on two compnodes with one thread each, cut in its middle, for a few steps. Measured is
the peak resident memory during the job beyond the bare runtime's, as `training_overhead.py` measures it. `living` is
what the estimator counts of tensors alive at once, `said` what it tells the planner: with what a C heap holds beyond
them. `heap` is measured less living in units of one microbatch's activations; the estimator reckons with 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import fusionai
from fusion_training import PeakMemory, middle_cut
from fusionai.graph.capture import capture_transformers
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import cut
from fusionai.owner.local_pool import LocalPool
from peers_training import model, tokens

CASES = ((256, 4, 128), (256, 2, 64), (256, 16, 64), (512, 2, 128), (512, 8, 64), (768, 1, 256))
"""Hidden size, sequences in a microbatch, tokens in a sequence."""

MICROBATCHES = 6
STEPS = 4


def rows(width: int, batch_size: int, length: int) -> list[dict[str, Any]]:
    """Return a row for each of the two compnodes."""
    changes = {"hidden_size": width, "intermediate_size": width * 11 // 4}

    def batch(step: int, index: int) -> dict[str, torch.Tensor]:
        ids = tokens(step, index, batch_size, length)
        return {"input_ids": ids, "labels": ids}

    def train(network: torch.nn.Module, run: Path) -> fusionai.TrainingResult:
        return fusionai.train(
            network,
            batch,
            broker=pool.token,
            run=run,
            steps=STEPS,
            microbatches=MICROBATCHES,
            privacy="open",
            compnodes=2,
            cuts=middle_cut,
        )

    with tempfile.TemporaryDirectory() as folder, LocalPool(2) as pool:
        train(model(hidden_size=8, intermediate_size=8), Path(folder) / "bare")
        with PeakMemory({name: pid for name, pid in pool.pids.items() if name != "broker"}) as memory:
            result = train(model(**changes), Path(folder) / "run")
        plan = json.loads((Path(result.run) / "plan.json").read_text())
    graph = capture_transformers(model(**changes)).graph
    found = []
    for name, stage, subdag in zip(
        result.compnodes, plan["pipelines"][0]["stages"], cut(graph, [middle_cut(graph)]), strict=True
    ):
        cost = stage_cost(subdag, {"s0": batch_size, "s1": length})
        living, used = cost.training_bytes(stage["in_flight"], 2), memory.peak[name] - memory.bare[name]
        said = stage["predicted"]["memory_bytes"]
        found.append(
            {
                "width": width,
                "batch_size": batch_size,
                "length": length,
                "stage": stage["stage"],
                "in_flight": stage["in_flight"],
                "living_bytes": living,
                "said_bytes": said,
                "measured_bytes": used,
                "heap_microbatches": (used - living) / cost.saved_bytes,
                "ratio": used / said,
            }
        )
    return found


def main() -> None:
    """Print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for case in CASES:
        found += rows(*case)
        print(f"width, batch and length {case}: done", file=sys.stderr)
    ratios = [row["ratio"] for row in found]
    if options.json:
        machine = f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}"
        summary = {"median_ratio": statistics.median(ratios), "max_ratio": max(ratios)}
        print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, **summary, "rows": found}))
        return
    print("width batch length stage in-flight   living     said measured    heap  measured/said")
    for row in found:
        living, said, used = (row[f"{name}_bytes"] / 1e6 for name in ("living", "said", "measured"))
        print(
            f"{row['width']:5} {row['batch_size']:5} {row['length']:6} {row['stage']:5} {row['in_flight']:9} "
            f"{living:5.0f} MB {said:5.0f} MB {used:5.0f} MB {row['heap_microbatches']:7.2f} {row['ratio']:14.2f}"
        )
    print(f"measured/said: median {statistics.median(ratios):.2f}, largest {max(ratios):.2f}")


if __name__ == "__main__":
    main()
