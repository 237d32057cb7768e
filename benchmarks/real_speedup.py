"""Measured training throughput of the planner's plan against equal layers, on four unequal compnodes.

    python benchmarks/real_speedup.py [--rounds 3] [--json]

Real processes on this machine train a Llama of 7 million parameters over emulated links; lab mode stretches their
passes by unequal factors. Each round measures three plans one after another:

* `planner`: what the broker makes of it.
* `equal_layers`: two layers each, compnodes in the order in which they joined: what a pipeline does without a planner.
* `equal_layers_best_order`: the same cuts, compnodes in the order that the planner finds best for them.

A ratio is a baseline's seconds per step over the planner's, within one round. A step's seconds are the median after
warming up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import fusionai
from fusionai.cli.lab_file import read_lab
from fusionai.graph.model import OpDag
from fusionai.owner.local_pool import LocalPool
from peers_training import LAYERS, model
from simulator_accuracy import WARM_UP, batch, calibrate

NAMES = ("compnode-1", "compnode-2", "compnode-3", "compnode-4")
MICROBATCHES = 8


@dataclass(frozen=True)
class Setting:
    """Four compnodes: how much slower each is, and the uplinks that are slower than the others."""

    name: str
    slowdowns: tuple[float, ...]
    rate_mbit: float
    one_way_ms: float
    slow_links: Mapping[str, float]
    """Mbit/s by "one<->other"."""


SETTINGS = (
    Setting("speeds 1:2:4:4, 100 Mbit/s, 10 ms", (4.0, 8.0, 16.0, 16.0), 100, 5, {}),
    Setting(
        "speeds 1:2:2:4, 100 Mbit/s, 10 ms, one member behind 5 Mbit/s",
        (4.0, 8.0, 8.0, 16.0),
        100,
        5,
        {f"compnode-4<->{name}": 5.0 for name in NAMES[:3]},
    ),
    Setting(
        "speeds 1:1:2:3, clusters of two at 200 Mbit/s joined by 10 Mbit/s, given alternately",
        (5.0, 5.0, 10.0, 15.0),
        10,
        10,
        {"compnode-1<->compnode-3": 200.0, "compnode-2<->compnode-4": 200.0},
    ),
)


def lab_text(setting: Setting) -> str:
    """Return the lab file of a setting."""
    lines = [f"default = {{ rate_mbit = {setting.rate_mbit}, one_way_ms = {setting.one_way_ms} }}"]
    lines += ["[slowdown]", *(f"{name} = {factor}" for name, factor in zip(NAMES, setting.slowdowns, strict=True))]
    lines += ["[links]"] if setting.slow_links else []
    for pair, rate in setting.slow_links.items():
        lines.append(f'"{pair}" = {{ rate_mbit = {rate}, one_way_ms = {setting.one_way_ms} }}')
    return "\n".join([*lines, ""])


def equal_layers(graph: OpDag) -> tuple[int, ...]:
    """Return the cuts in front of every second layer."""
    each = LAYERS // len(NAMES)
    first: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        parts = node.scope.split(".")
        if "layers" in parts:
            first.setdefault(int(parts[parts.index("layers") + 1]), position)
    return tuple(first[layer] for layer in range(each, LAYERS, each))


def measure(setting: Setting, calibration: Path, steps: int, **placement: Any) -> dict[str, Any]:
    """Train with one placement; return seconds per step and the plan."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lab = folder / "lab.toml"
        lab.write_text(lab_text(setting))
        for name in NAMES:
            (folder / name).mkdir()
            (folder / name / "calibration.json").write_bytes(calibration.read_bytes())
        with LocalPool(len(NAMES), folder=folder, lab=lab) as pool:
            fusionai.train(
                model(),
                batch,
                broker=pool.token,
                run=folder / "run",
                steps=steps + WARM_UP,
                microbatches=MICROBATCHES,
                privacy="open",
                owner=fusionai.OwnerOptions(token=pool.token, lab=read_lab(lab).network),
                **placement,
            )
        plan = json.loads((folder / "run/plan.json").read_text())
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    took = [late["elapsed_s"] - early["elapsed_s"] for early, late in itertools.pairwise(lines)][WARM_UP - 1 :]
    return {
        "step_s": statistics.median(took),
        "predicted_s": plan["predicted_step_s"],
        "stages": len(plan["pipelines"][0]["stages"]),
        "plan": plan["explanation"],
    }


def main() -> None:
    """Measure every setting; print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, from 0")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from fusionai.graph.capture import capture_transformers

    cuts = equal_layers(capture_transformers(model()).graph)
    placements: dict[str, dict[str, Any]] = {
        "planner": {},
        "equal_layers": {"cuts": cuts, "machines": NAMES},
        "equal_layers_best_order": {"cuts": cuts},
    }
    out = sys.stderr if options.json else sys.stdout
    chosen = SETTINGS if options.only is None else [SETTINGS[number] for number in options.only]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        calibration = calibrate(Path(folder))
        for setting in chosen:
            rounds = []
            for _ in range(options.rounds):
                rounds.append({n: measure(setting, calibration, options.steps, **p) for n, p in placements.items()})
                line = ", ".join(f"{name} {found['step_s']:.2f} s" for name, found in rounds[-1].items())
                print(f"{setting.name}: {line}", file=out, flush=True)
            row: dict[str, Any] = {"setting": setting.name, "rounds": rounds}
            for name in list(placements)[1:]:
                ratios = [each[name]["step_s"] / each["planner"]["step_s"] for each in rounds]
                row[name] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                print(
                    f"  {name} over planner: {row[name]['median']:.2f} "
                    f"({row[name]['least']:.2f}-{row[name]['most']:.2f})",
                    file=out,
                    flush=True,
                )
            rows.append(row)
    if options.json:
        machine = f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}"
        print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
