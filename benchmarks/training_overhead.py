"""What FusionAI costs over plain PyTorch, and how it compares with torch.distributed.pipelining.

    python benchmarks/training_overhead.py [--rounds 9] [--against CHECKOUT] [--json]

Four systems train one Llama of 7 million parameters on the same batches, in turn, several rounds:

    a  plain PyTorch loop, two threads              b  FusionAI, one compnode with two threads
    c  torch.distributed.pipelining 1F1B over gloo, two processes with one thread each
    d  FusionAI, two compnodes with one thread each, cut between the same layers

`one_node_ratio` is speed b / speed a and `two_node_ratio` is d / c, of medians within a round; several rounds give the
spread. Every second round runs its systems in the opposite order, so that a machine which becomes slower or faster
favours neither side of a pair. With `--against`, the sources of another checkout run as b and d too, in the same
rounds: `one_node_new_to_old` and `two_node_new_to_old` are this checkout's speed over the other's. Of all the ratios
of a kind, the median and the range are given.

`peak_memory_ratio` is the peak resident memory of d's compnodes during the job, beyond that of the bare runtime, over
what the estimator said the stage needs: the largest of all rounds and compnodes. The bare runtime is the same process
after a job of the same layers 8 wide, three steps: what torch and FusionAI load at their first use is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).resolve().parent
WARM_UP = 3
"""Steps at the start of each run that are not counted: caches fill, memory is first touched."""


def child(script: str, arguments: list[str], options: argparse.Namespace, sources: Path) -> Any:
    """Run a benchmark script in a process of its own on the sources of a checkout, and return what it printed."""
    command = [sys.executable, str(HERE / script), *arguments]
    command += ["--steps", str(options.steps), "--microbatches", str(options.microbatches)]
    command += ["--batch-size", str(options.batch_size), "--length", str(options.length)]
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600, env=environment).stdout
    return json.loads(output.strip().splitlines()[-1])


def systems(options: argparse.Namespace, memory: list[float]) -> dict[str, Callable[[], list[float]]]:
    """Return the systems by name, each a function to its seconds by step; memory ratios of d are added to `memory`."""
    new = HERE.parent / "src"

    def peer(name: str, threads: int) -> Callable[[], list[float]]:
        return lambda: list(child("peers_training.py", [name, "--threads", str(threads)], options, new))

    def fusion(compnodes: int, threads: int, sources: Path) -> Callable[[], list[float]]:
        def seconds() -> list[float]:
            arguments = ["--compnodes", str(compnodes), "--threads", str(threads)]
            found = child("fusion_training.py", arguments, options, sources)
            if Path(found["sources"]).parent != sources:
                raise SystemExit(f"{found['sources']} ran, and not the sources in {sources}")
            if compnodes == 2 and sources == new:
                memory.extend(found["memory"])
            return list(found["seconds"])

        return seconds

    found = {
        "a_plain": peer("plain", 2),
        "b_one_compnode": fusion(1, 2, new),
        "c_pipelining": peer("pipelining", 1),
        "d_two_compnodes": fusion(2, 1, new),
    }
    if options.against is not None:
        old = options.against.resolve() / "src"
        found |= {"b_against": fusion(1, 2, old), "d_against": fusion(2, 1, old)}
    # Pairs that are compared run next to each other.
    order = ("a_plain", "b_one_compnode", "b_against", "d_against", "d_two_compnodes", "c_pipelining")
    chosen = options.systems.split(",") if options.systems else order
    return {name: found[name] for name in order if name in found and name in chosen}


def summary(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


RATIOS = {
    "one_node": ("b_one_compnode", "a_plain"),
    "two_node": ("d_two_compnodes", "c_pipelining"),
    "one_node_new_to_old": ("b_one_compnode", "b_against"),
    "two_node_new_to_old": ("d_two_compnodes", "d_against"),
}
"""Each ratio's systems: speed of the first over speed of the second."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and return the figures."""
    memory: list[float] = []
    running = systems(options, memory)
    step_tokens = options.microbatches * options.batch_size * options.length
    speeds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(options.rounds):
        order = list(running) if number % 2 == 0 else list(reversed(running))
        for name in order:
            speed = step_tokens / statistics.median(running[name]()[WARM_UP:])
            speeds[name].append(speed)
            print(f"round {number + 1}: {name:16} {speed:8.0f} tokens/s", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}",
        "rounds": options.rounds,
        "steps": options.steps,
        "tokens_per_s": {name: summary(values) for name, values in speeds.items()},
    }
    for name, values in ratios(speeds).items():
        figures[f"{name}_ratio"] = statistics.median(values)
        figures[f"{name}_spread"] = summary(values)
    if memory:
        figures |= {"peak_memory_ratio": max(memory), "peak_memory_spread": summary(memory)}
    return figures


def ratios(speeds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return each ratio of `RATIOS` whose systems ran, round by round."""
    return {
        name: [over / under for over, under in zip(speeds[above], speeds[below], strict=True)]
        for name, (above, below) in RATIOS.items()
        if above in speeds and below in speeds
    }


def main() -> None:
    """Print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--against", type=Path, help="another checkout of FusionAI to run in the same rounds")
    parser.add_argument("--systems", help="names of the only systems to run, such as c_pipelining,d_two_compnodes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure(options)
    if options.json:
        print(json.dumps(figures))
        return
    for name, values in figures["tokens_per_s"].items():
        print(f"{name:16} {values['median']:8.0f} tokens/s  ({values['min']:.0f}-{values['max']:.0f})")
    for name in (*RATIOS, "peak_memory"):
        if (spread := figures.get(f"{name}_spread")) is not None:
            print(f"{name}_ratio {figures[f'{name}_ratio']:.3f}  ({spread['min']:.3f}-{spread['max']:.3f})")


if __name__ == "__main__":
    main()
