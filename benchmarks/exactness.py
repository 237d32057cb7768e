"""Training over 1-4 compnodes against training in one process, for every promised kind of model: the whole matrix.

    python benchmarks/exactness.py [--models llama,cnn] [--steps 20] [--json]

Every model is trained with SGD and with AdamW, private and open, over 1 to 4 compnodes with two counts of microbatches
each. A case passes when every loss and every weight tensor (by norm) is within 1e-5 relative of a plain PyTorch loop in
this process. One weight kind has an absolute bound instead: a bias on the keys of softmax attention has no effect, so
its gradient is rounding noise around zero (`tests/integration/models.py`). Twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fusionai
from fusionai.owner.local_pool import LocalPool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "integration"))

from models import CONFIGURATIONS, ConvolutionalNet, image_batch, language_model, named_parts, token_batch, train_alone

TOLERANCE = 1e-5
OPTIMIZERS = {"adamw": ({"kind": "adamw", "weight_decay": 0.01}, 1e-3), "sgd": ({"kind": "sgd", "momentum": 0.9}, 1e-2)}
MICROBATCHES = {1: (1, 3), 2: (2, 5), 3: (1, 4), 4: (3, 8)}
"""By number of compnodes: fewer, as many and more than stages."""


class _Losses(fusionai.Observer):
    def __init__(self) -> None:
        self.values: list[float] = []

    def stepped(self, event: fusionai.StepEvent) -> None:
        self.values.append(event.loss)


def _make(name: str) -> tuple[torch.nn.Module, Any]:
    if name == "cnn":
        return ConvolutionalNet(), image_batch(4)
    return language_model(name), token_batch(name, 2, 16)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return (found.double() - expected.double()).norm().item() / max(expected.double().norm().item(), 1e-12)


def case(
    pool: LocalPool, name: str, kind: str, compnodes: int, microbatches: int, privacy: Any, steps: int
) -> dict[str, Any]:
    """Train twice and return the largest deviations."""
    settings, rate = OPTIMIZERS[kind]
    alone, batch = _make(name)
    expected = train_alone(
        alone, batch, steps=steps, microbatches=microbatches, optimizer=settings, learning_rate=rate, gradient_clip=1.0
    )
    together, batch = _make(name)
    losses = _Losses()
    with tempfile.TemporaryDirectory() as folder:
        fusionai.train(
            together,
            batch,
            broker=pool.token,
            steps=steps,
            microbatches=microbatches,
            learning_rate=rate,
            optimizer=fusionai.OptimizerConfig(**settings),
            gradient_clip=1.0,
            privacy=privacy,
            compnodes=compnodes,
            run=Path(folder) / "run",
            observer=losses,
        )
    reference, found = named_parts(alone.state_dict()), named_parts(together.state_dict())
    shiftless = [key for key in found if key.endswith("key.bias")]
    return {
        "model": name,
        "optimizer": kind,
        "privacy": privacy,
        "compnodes": compnodes,
        "microbatches": microbatches,
        "loss_deviation": max(abs(a - b) / abs(b) for a, b in zip(losses.values, expected, strict=True)),
        "weight_deviation": max(relative(found[key], reference[key]) for key in found if key not in shiftless),
        "key_bias_deviation": max((float((found[key] - reference[key]).abs().max()) for key in shiftless), default=0.0),
    }


def passes(row: dict[str, Any]) -> bool:
    """Return whether a case is within its bounds."""
    return max(row["loss_deviation"], row["weight_deviation"], row["key_bias_deviation"]) <= TOLERANCE


def main() -> int:
    """Run the matrix; print a line a model, or with --json every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default=",".join([*CONFIGURATIONS, "cnn"]))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with LocalPool(4) as pool:
        for name in options.models.split(","):
            for kind, privacy, compnodes in itertools.product(OPTIMIZERS, ("private", "open"), MICROBATCHES):
                for microbatches in MICROBATCHES[compnodes]:
                    rows.append(case(pool, name, kind, compnodes, microbatches, privacy, options.steps))
                    if not passes(rows[-1]):
                        print(f"deviates: {rows[-1]}", file=sys.stderr)
            mine = [row for row in rows if row["model"] == name]
            print(
                f"{name:12} {sum(map(passes, mine))}/{len(mine)} within {TOLERANCE:g}; largest deviation: loss "
                f"{max(row['loss_deviation'] for row in mine):.1e}, weight tensor "
                f"{max(row['weight_deviation'] for row in mine):.1e}",
                file=sys.stderr if options.json else sys.stdout,
                flush=True,
            )
    failed = [row for row in rows if not passes(row)]
    if options.json:
        print(
            json.dumps(
                {"date": time.strftime("%Y-%m-%d"), "cases": len(rows), "passed": len(rows) - len(failed), "rows": rows}
            )
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
