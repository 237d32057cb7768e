"""What re-planning gives when a machine becomes slower: real runs in lab mode, with it and without.

Three compnodes train a small Llama on this machine; speeds are emulated (three times slower than a core, so that they
do not compete), and one of them becomes three times slower still at a given step. The same run is made twice, with
placement.replan off and on.

    python benchmarks/replanning.py [--json] [--steps 90] [--after 30] [--factor 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import fusionai
from fusionai.cli.lab_file import read_lab
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.membership import OwnerOptions
from simulator_accuracy import calibrate

COMPNODES, THROTTLED = 3, "compnode-2"
BATCH, LENGTH, VOCABULARY, MICROBATCHES = 2, 64, 512, 4
WINDOW = 10
"""Steps that a pace is the median of."""


def model() -> torch.nn.Module:
    """Return the Llama that is trained, always with the same weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    made: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return made.train()


def batch(step: int, index: int) -> dict[str, torch.Tensor]:
    """Return a microbatch as a function of its place."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def run(calibration: Path, *, steps: int, after: int, factor: float, replan: bool) -> dict[str, Any]:
    """Train once; return paces in steps per second, and what became of new plans."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lab = folder / "lab.toml"
        speeds = [f"compnode-{number} = 3.0" for number in range(1, COMPNODES + 1)]
        throttle = f"{THROTTLED} = {{ after_steps = {after}, factor = {factor} }}"
        lab.write_text("\n".join(["[slowdown]", *speeds, "[throttle]", throttle, ""]))
        for number in range(1, COMPNODES + 1):
            (folder / f"compnode-{number}").mkdir()
            shutil.copy(calibration, folder / f"compnode-{number}" / "calibration.json")
        with LocalPool(COMPNODES, folder=folder, lab=lab) as pool:
            fusionai.train(
                model(),
                batch,
                broker=pool.token,
                run=folder / "run",
                steps=steps,
                microbatches=MICROBATCHES,
                optimizer=OptimizerConfig(),
                privacy="open",
                compnodes=COMPNODES,
                replan=replan,
                owner=OwnerOptions(token=pool.token, lab=read_lab(lab).network),
            )
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "before_steps_per_s": 1 / statistics.median(seconds[step] for step in range(after - WINDOW + 1, after + 1)),
        "end_steps_per_s": 1 / statistics.median(seconds[step] for step in range(steps - WINDOW + 1, steps + 1)),
        "replans": [{"step": line["step"], **line["replan"]} for line in lines if "replan" in line],
        "losses": losses,
    }


def main() -> None:
    """Run both; print the figures, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--after", type=int, default=30, help="steps before the machine becomes slower")
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not WINDOW < options.after < options.steps - 2 * WINDOW:
        parser.error(f"--after must be above {WINDOW}, and at least {2 * WINDOW} below --steps")
    torch.set_num_threads(1)
    terms = {"steps": options.steps, "after": options.after, "factor": options.factor}
    with tempfile.TemporaryDirectory() as folder:
        calibration = calibrate(Path(folder))
        without = run(calibration, **terms, replan=False)
        with_it = run(calibration, **terms, replan=True)
    answers = [each for each in with_it["replans"] if each["taken"] and each["noticed_step"] > options.after]
    answer = answers[0] if answers else None
    losses = zip(without.pop("losses"), with_it.pop("losses"), strict=True)
    found = {
        **terms,
        "before_steps_per_s": with_it["before_steps_per_s"],
        "throttled_steps_per_s": without["end_steps_per_s"],
        "replanned_steps_per_s": with_it["end_steps_per_s"],
        "speedup": with_it["end_steps_per_s"] / without["end_steps_per_s"],
        "steps_until_noticed": answer["noticed_step"] - options.after if answer else None,
        "steps_until_taken": answer["step"] - options.after if answer else None,
        "pause_s": answer["pause_s"] if answer else None,
        "bytes_moved": answer["bytes_moved"] if answer else None,
        "largest_loss_difference": max(abs(one - other) / abs(one) for one, other in losses),
        "replans": with_it["replans"],
    }
    if options.json:
        machine = f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}"
        print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, "load": os.getloadavg()[0], **found}))
        return
    for name, figure in found.items():
        if name != "replans":
            print(f"{name:26} {figure:.4g}" if isinstance(figure, float) else f"{name:26} {figure}")
    for each in with_it["replans"]:
        print(f"step {each['step']}: {each['reason']}{': ' + each['error'] if each['error'] else ''}")


if __name__ == "__main__":
    main()
