"""FusionAI's side of `training_overhead.py`: one run in a process of its own, which prints one JSON object.

    python benchmarks/fusion_training.py --compnodes 2 --threads 1 --steps 12

A process of its own lets one benchmark compare two checkouts: `PYTHONPATH` says whose sources run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

import fusionai
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from peers_training import LAYERS, model, tokens


class PeakMemory:
    """The most resident memory of processes between entering and leaving.

    Linux keeps it, and forgets it when asked; elsewhere it is sampled, which costs the measured processes some time.
    """

    def __init__(self, pids: dict[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.bare = {name: process.memory_info().rss for name, process in self._processes.items()}
        self.peak = dict(self.bare)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._kept = Path("/proc/self/clear_refs").exists()

    def __enter__(self) -> PeakMemory:
        if self._kept:
            for process in self._processes.values():
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        else:
            self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._kept:
            for name, process in self._processes.items():
                status = Path(f"/proc/{process.pid}/status").read_text()
                line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
                self.peak[name] = int(line.split()[1]) * 1024
        else:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            for name, process in self._processes.items():
                self.peak[name] = max(self.peak[name], process.memory_info().rss)


def middle_cut(graph: Any) -> int:
    """Return the position at which the second half of the layers begins."""
    half = f"model.layers.{LAYERS // 2}"
    return next(position for position, node in enumerate(graph.nodes) if f"{node.scope}.".startswith(f"{half}."))


def predicted_bytes(plan: dict[str, Any]) -> list[int]:
    """Return the memory that a plan reckons with, by stage."""
    stages = plan["stages"] if "stages" in plan else plan["pipelines"][0]["stages"]
    return [stage["predicted"]["memory_bytes"] for stage in stages]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return seconds by step and each compnode's peak memory over its predicted memory."""

    def batch(step: int, index: int) -> dict[str, torch.Tensor]:
        ids = tokens(step, index, options.batch_size, options.length)
        return {"input_ids": ids, "labels": ids}

    def train(network: torch.nn.Module, folder: Path, steps: int) -> fusionai.TrainingResult:
        return fusionai.train(
            network,
            batch,
            broker=pool.token,
            run=folder,
            steps=steps,
            microbatches=options.microbatches,
            learning_rate=1e-3,
            gradient_clip=0.0,
            optimizer=OptimizerConfig(kind="adamw"),
            privacy="open",
            compnodes=options.compnodes,
            replan=False,
            cuts=middle_cut if options.compnodes == 2 else (),
        )

    with tempfile.TemporaryDirectory() as folder, LocalPool(options.compnodes, threads=options.threads) as pool:
        train(model(hidden_size=8, intermediate_size=8), Path(folder) / "bare", 3)
        with PeakMemory({name: pid for name, pid in pool.pids.items() if name != "broker"}) as memory:
            result = train(model(), Path(folder) / "run", options.steps)
        lines = (Path(result.run) / "metrics.jsonl").read_text().splitlines()
        plan = json.loads((Path(result.run) / "plan.json").read_text())
    elapsed = [json.loads(line)["elapsed_s"] for line in lines]
    used = [memory.peak[name] - memory.bare[name] for name in result.compnodes]
    return {
        "sources": str(Path(fusionai.__file__).resolve().parent),
        "seconds": [elapsed[0], *(late - early for early, late in itertools.pairwise(elapsed))],
        "memory": [got / said for got, said in zip(used, predicted_bytes(plan), strict=True)],
        "final_loss": result.final_loss,
    }


def main() -> None:
    """Run once and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--compnodes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
