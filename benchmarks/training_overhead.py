"""What FusionAI costs over plain PyTorch, and how it compares with torch.distributed.pipelining.

    python benchmarks/training_overhead.py [--rounds 5] [--json]

Four systems train one Llama of 7 million parameters on the same batches, in turn, several rounds:

    a  plain PyTorch loop, two threads              b  FusionAI, one compnode with two threads
    c  torch.distributed.pipelining 1F1B over gloo, two processes with one thread each
    d  FusionAI, two compnodes with one thread each, cut between the same layers

`one_node_ratio` is speed b / speed a and `two_node_ratio` is d / c, of medians within a round; several rounds give the
spread. `peak_memory_ratio` is the peak resident memory of d's compnodes during the job, beyond that of the bare
runtime, over what the estimator said the stage needs: the largest of all rounds and compnodes. The bare runtime is the
same process after a job of the same layers 8 wide, three steps: what torch and FusionAI load at their first use is
there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import fusionai
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from peers_training import LAYERS, model, tokens

HERE = Path(__file__).resolve().parent
WARM_UP = 3
"""Steps at the start of each run that are not counted: caches fill, memory is first touched."""


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


def peer(name: str, threads: int, options: argparse.Namespace) -> list[float]:
    """Run a peer in a process of its own and return its seconds per step."""
    command = [sys.executable, str(HERE / "peers_training.py"), name, "--threads", str(threads)]
    command += ["--steps", str(options.steps), "--microbatches", str(options.microbatches)]
    command += ["--batch-size", str(options.batch_size), "--length", str(options.length)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    seconds: list[float] = json.loads(output.strip().splitlines()[-1])
    return seconds


def middle_cut(graph: Any) -> int:
    """Return the position at which the second half of the layers begins."""
    half = f"model.layers.{LAYERS // 2}"
    return next(position for position, node in enumerate(graph.nodes) if f"{node.scope}.".startswith(f"{half}."))


def ours(compnodes: int, threads: int, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Run FusionAI; return seconds per step, and peak memory over predicted memory by compnode."""

    def batch(step: int, index: int) -> dict[str, torch.Tensor]:
        ids = tokens(step, index, options.batch_size, options.length)
        return {"input_ids": ids, "labels": ids}

    def train(network: torch.nn.Module, run: Path, steps: int) -> fusionai.TrainingResult:
        return fusionai.train(
            network,
            batch,
            broker=pool.token,
            run=run,
            steps=steps,
            microbatches=options.microbatches,
            learning_rate=1e-3,
            gradient_clip=0.0,
            optimizer=OptimizerConfig(kind="adamw"),
            privacy="open",
            compnodes=compnodes,
            replan=False,
            cuts=middle_cut if compnodes == 2 else (),
        )

    with tempfile.TemporaryDirectory() as folder, LocalPool(compnodes, threads=threads) as pool:
        train(model(hidden_size=8, intermediate_size=8), Path(folder) / "bare", 3)
        with PeakMemory({name: pid for name, pid in pool.pids.items() if name != "broker"}) as memory:
            result = train(model(), Path(folder) / "run", options.steps)
        lines = (Path(result.run) / "metrics.jsonl").read_text().splitlines()
        plan = json.loads((Path(result.run) / "plan.json").read_text())
    elapsed = [json.loads(line)["elapsed_s"] for line in lines]
    seconds = [elapsed[0], *(late - early for early, late in itertools.pairwise(elapsed))]
    predicted = [stage["predicted"]["memory_bytes"] for stage in plan["stages"]]
    used = [memory.peak[name] - memory.bare[name] for name in result.compnodes]
    return seconds, [got / said for got, said in zip(used, predicted, strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and return the figures."""
    memory: list[float] = []

    def fusion(compnodes: int, threads: int) -> list[float]:
        seconds, ratios = ours(compnodes, threads, options)
        if compnodes == 2:
            memory.extend(ratios)
        return seconds

    systems: dict[str, Callable[[], list[float]]] = {
        "a_plain": lambda: peer("plain", 2, options),
        "b_one_compnode": lambda: fusion(1, 2),
        "c_pipelining": lambda: peer("pipelining", 1, options),
        "d_two_compnodes": lambda: fusion(2, 1),
    }
    step_tokens = options.microbatches * options.batch_size * options.length
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(options.rounds):
        for name, run in systems.items():
            speed = step_tokens / statistics.median(run()[WARM_UP:])
            speeds[name].append(speed)
            print(f"round {number + 1}: {name:16} {speed:8.0f} tokens/s", file=sys.stderr)
    one = [b / a for a, b in zip(speeds["a_plain"], speeds["b_one_compnode"], strict=True)]
    two = [d / c for c, d in zip(speeds["c_pipelining"], speeds["d_two_compnodes"], strict=True)]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}",
        "tokens_per_s": {name: summary(values) for name, values in speeds.items()},
        "one_node_ratio": statistics.median(one),
        "one_node_spread": summary(one),
        "two_node_ratio": statistics.median(two),
        "two_node_spread": summary(two),
        "peak_memory_ratio": max(memory),
        "peak_memory_spread": summary(memory),
    }


def main() -> None:
    """Print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure(options)
    if options.json:
        print(json.dumps(figures))
        return
    for name, values in figures["tokens_per_s"].items():
        print(f"{name:16} {values['median']:8.0f} tokens/s  ({values['min']:.0f}-{values['max']:.0f})")
    for name in ("one_node", "two_node", "peak_memory"):
        spread = figures[f"{name}_spread"]
        print(f"{name}_ratio {figures[f'{name}_ratio']:.3f}  ({spread['min']:.3f}-{spread['max']:.3f})")


if __name__ == "__main__":
    main()
