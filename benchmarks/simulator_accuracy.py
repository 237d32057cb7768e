"""Predicted against measured step times of real runs: what the planner's estimate is worth.

    python benchmarks/simulator_accuracy.py [--steps 8] [--json]

Each run is a pool of real processes on this machine that trains a Llama of 7 million parameters. Compnodes differ in
speed (lab mode stretches every pass by a factor, so that six of them fit two cores) and links are emulated, from 10
Mbit/s to unlimited and from 0 to 100 ms round trip. The prediction is the plan's: made by the broker from what it
measured when the compnodes joined, before the first step. Measured is the median time between two steps, after warming
up.

The device is measured before each run, alone, and all compnodes of the run take that profile over, since on two cores
six that measure at once would measure each other. What a shared machine gives varies from one minute to the next, so
the device is measured again after the run: where products of matrices then take over 8 % more or less time, the run is
made again, at most twice, and `disturbed` says when it was no better. The errors of all runs are in `attempts`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
import psutil
import torch

import fusionai
from fusionai.cli.lab_file import read_lab
from fusionai.owner.local_pool import LocalPool
from peers_training import model, tokens

BATCH, LENGTH = 2, 64
WARM_UP = 2
MOST_ATTEMPTS = 3
MOST_CHANGE = 0.08
"""Of the machine's speed during a run."""


@dataclass(frozen=True)
class Scenario:
    """One run."""

    slowdowns: tuple[float, ...]
    """Of each compnode."""
    rate_mbit: float | None
    one_way_ms: float
    microbatches: int
    privacy: Literal["private", "open"] = "open"
    compnodes: int = 0
    """How many to use; 0 leaves it to the planner."""

    @property
    def name(self) -> str:
        """Return a short description."""
        rate = "unlimited" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        speeds = "/".join(f"{each:g}" for each in self.slowdowns)
        return f"{speeds} slower, {rate}, {2 * self.one_way_ms:g} ms, {self.microbatches} microbatches, {self.privacy}"


SCENARIOS = (
    Scenario((2, 2), None, 0, 8, compnodes=2),
    Scenario((2, 4), None, 0, 8, compnodes=2),
    Scenario((2, 4), 100, 5, 8, compnodes=2),
    Scenario((2, 6), 10, 10, 6, compnodes=2),
    Scenario((2, 2), 50, 50, 8, compnodes=2),
    Scenario((3, 3, 3), None, 0, 8, compnodes=3),
    Scenario((3, 4, 6), 100, 10, 8, compnodes=3),
    Scenario((3, 4, 6), 10, 25, 6, compnodes=3),
    Scenario((4, 4, 4, 4), 1000, 1, 10, compnodes=4),
    Scenario((4, 5, 6, 8), 50, 20, 10, compnodes=4),
    Scenario((5, 5, 6, 6, 8), 100, 50, 8, compnodes=5),
    Scenario((6, 6, 6, 6, 6, 6), 1000, 2, 12, compnodes=6),
    Scenario((6, 6, 8, 8, 12, 12), 25, 15, 8, compnodes=6),
    Scenario((3, 3), None, 0, 8, "private", 2),
    Scenario((4, 4, 6), 50, 10, 8, "private", 3),
    Scenario((4, 4, 12), 20, 25, 8),
)


def lab_text(scenario: Scenario) -> str:
    """Return the lab file of a scenario."""
    slowdowns = [f"compnode-{number} = {factor}" for number, factor in enumerate(scenario.slowdowns, start=1)]
    rate = "" if scenario.rate_mbit is None else f"rate_mbit = {scenario.rate_mbit}, "
    return "\n".join([f"default = {{ {rate}one_way_ms = {scenario.one_way_ms} }}", "[slowdown]", *slowdowns, ""])


def batch(step: int, index: int) -> dict[str, torch.Tensor]:
    """Return a microbatch as a function of its place."""
    ids = tokens(step, index, BATCH, LENGTH)
    return {"input_ids": ids, "labels": ids}


def measure(scenario: Scenario, calibration: Path, steps: int) -> dict[str, Any]:
    """Train, and return what was predicted and what it took."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lab = folder / "lab.toml"
        lab.write_text(lab_text(scenario))
        for number in range(1, len(scenario.slowdowns) + 1):
            state = folder / f"compnode-{number}"
            state.mkdir()
            shutil.copy(calibration, state / "calibration.json")
        with LocalPool(len(scenario.slowdowns), folder=folder, lab=lab) as pool:
            result = fusionai.train(
                model(),
                batch,
                broker=pool.token,
                run=folder / "run",
                steps=steps + WARM_UP,
                microbatches=scenario.microbatches,
                privacy=scenario.privacy,
                compnodes=scenario.compnodes,
                replan=False,
                owner=fusionai.OwnerOptions(token=pool.token, lab=read_lab(lab).network),
            )
        plan = json.loads((folder / "run/plan.json").read_text())
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    took = [late["elapsed_s"] - early["elapsed_s"] for early, late in itertools.pairwise(lines)][WARM_UP - 1 :]
    predicted, measured = plan["predicted_step_s"], statistics.median(took)
    return {
        **asdict(scenario),
        "name": scenario.name,
        "stages": len(plan["pipelines"][0]["stages"]),
        "used": len(result.compnodes),
        "predicted_s": predicted,
        "measured_s": measured,
        "measured_spread_s": [min(took), max(took)],
        "error": predicted / measured - 1,
        "bottleneck": plan["bottleneck"],
        "lab": result.lab,
    }


def calibrate(folder: Path) -> Path:
    """Measure this machine with one thread, alone, as a compnode does; return the file it is kept in.

    It also becomes the owner's, which would otherwise be whatever was measured on this machine at some time before.
    """
    with LocalPool(1, names=["measured"], folder=folder):
        pass
    kept = folder / "measured" / "calibration.json"
    os.environ["XDG_DATA_HOME"] = str(folder / "data")
    own = Path(platformdirs.user_data_dir("fusionai", appauthor=False)) / "owner"
    if own.is_relative_to(folder):
        own.mkdir(parents=True)
        shutil.copy(kept, own / "calibration.json")
    return kept


def speed(calibration: Path) -> float:
    """Return the FLOP/s of matrix products that a file of measurements holds."""
    (found,) = json.loads(calibration.read_text()).values()
    return float(found["flops_per_s"]["matmul"])


def undisturbed(scenario: Scenario, steps: int, out: Any) -> dict[str, Any]:
    """Return a run during which the machine kept its speed, or the one during which it changed least."""
    attempts: list[dict[str, Any]] = []
    for _ in range(MOST_ATTEMPTS):
        with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
            calibration = calibrate(Path(before))
            row = measure(scenario, calibration, steps)
            row["speed_after"] = speed(calibrate(Path(after))) / speed(calibration)
        attempts.append(row)
        print(
            f"{row['name']:76} predicted {row['predicted_s'] * 1e3:6.0f} ms, "
            f"measured {row['measured_s'] * 1e3:6.0f} ms, {row['error']:+.1%} "
            f"(speed after it {row['speed_after']:.0%})",
            file=out,
            flush=True,
        )
        if abs(row["speed_after"] - 1) <= MOST_CHANGE:
            break
    best = min(attempts, key=lambda each: abs(each["speed_after"] - 1))
    errors = [each["error"] for each in attempts]
    return {**best, "disturbed": abs(best["speed_after"] - 1) > MOST_CHANGE, "attempts": errors}


def main() -> None:
    """Run every scenario; print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of scenarios, from 0")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = SCENARIOS if options.only is None else [SCENARIOS[number] for number in options.only]
    out = sys.stderr if options.json else sys.stdout
    rows = [undisturbed(scenario, options.steps, out) for scenario in chosen]
    errors = [abs(row["error"]) for row in rows]
    disturbed = sum(row["disturbed"] for row in rows)
    summary = {
        "median_error": statistics.median(errors),
        "max_error": max(errors),
        "runs": len(rows),
        "disturbed": disturbed,
    }
    if options.json:
        machine = f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}"
        print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, **summary, "rows": rows}))
    else:
        print(
            f"{len(rows)} runs, {disturbed} disturbed: median error {summary['median_error']:.1%}, "
            f"largest {summary['max_error']:.1%}"
        )


if __name__ == "__main__":
    main()
