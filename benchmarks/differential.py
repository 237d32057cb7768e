"""Trains small random modules on two compnodes and in a plain loop of torch, and compares every loss and tensor.

    python benchmarks/differential.py                      # seeds 0 to 499, or what is left of them
    python benchmarks/differential.py --seed 17            # one seed: its source, and how it goes
    python benchmarks/differential.py --seed 17 --source   # its source only
    python benchmarks/differential.py --summary            # the table of what has been run

A seed draws a module as Python source (`tests/integration/random_modules.py`), how it is trained, and where it is cut.
The pool is a broker and two compnodes as processes. A line for each seed goes to `--results`; a run that was stopped
goes on with the seeds that have no line. A line with other differences than rounding, or an error that is not the
user's, makes the exit status 1. Ten to fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "integration"))

from random_modules import draw_case
from trained_twice import compare

from fusionai.graph.vocabulary import VOCABULARY
from quick_pool import QuickPool

GOOD = ("equal", "refused", "unusable")


def run(seeds: Iterable[int], results: Path | None) -> list[dict[str, Any]]:
    """Compare every seed on one pool; append a line for each to a file."""
    rows = []
    with QuickPool(2) as pool:
        for seed in seeds:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about what the modules do
                row = asdict(compare(seed, pool.token))
            rows.append(row)
            if results is not None:
                results.parent.mkdir(parents=True, exist_ok=True)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if row["outcome"] not in GOOD:
                print(f"seed {seed} {row['outcome']}: {row['text']}", file=sys.stderr, flush=True)
    return rows


def known(results: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of a file by seed."""
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {row["seed"]: row for row in rows}


def kind_of(text: str) -> str:
    """Return an error without the names and numbers of its case."""
    text = re.sub(r" \(module_\d+\.py:\d+, in \w+\)", "", text)
    text = re.sub(r"'[^']*'", lambda found: found[0] if "." in found[0] else "'...'", text)
    return re.sub(r"\b\d[\d.e+-]*", "N", text)[:230]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables of docs/benchmarks.md, and what was refused, as Markdown."""
    outcomes = Counter(row["outcome"] for row in rows)
    equal = [row for row in rows if row["outcome"] == "equal"]
    lines = ["| outcome | modules |", "|---|---|", *(f"| {name} | {count} |" for name, count in outcomes.most_common())]
    exact = [row for row in equal if not row["rounding"]]
    lines += [
        "",
        f"bit for bit: {sum(row['deviation'] == 0 for row in equal)}; largest deviation of the equal ones: "
        f"{max((row['deviation'] for row in exact), default=0.0):.1e}; above 1e-5, but within four times what single "
        f"precision does to the plain loop: {len(equal) - len(exact)}",
        f"private: {sum(row['privacy'] == 'private' for row in equal)} of the equal ones; "
        f"{sum(bool(row['private_refusal']) for row in rows)} had to be trained openly",
    ]
    seen = Counter(name for row in equal for name in row["operators"])
    missing = sorted(VOCABULARY.keys() - seen.keys())
    lines += [f"operators of the vocabulary in them: {len(seen)} of {len(VOCABULARY)}; not: {', '.join(missing)}"]
    for outcome in ("refused", "failed", "differs", "unusable"):
        kinds = Counter(kind_of(row["text"]) for row in rows if row["outcome"] == outcome)
        examples = {kind_of(row["text"]): row["seed"] for row in rows if row["outcome"] == outcome}
        lines += [
            "",
            f"{outcome}:",
            *(f"- {count} x (seed {examples[kind]}) {kind}" for kind, count in kinds.most_common()),
        ]
    kinds = Counter(kind_of(row["private_refusal"]) for row in rows if row["private_refusal"])
    lines += ["", "not private:", *(f"- {count} x {kind}" for kind, count in kinds.most_common())]
    return "\n".join(lines)


def main() -> int:
    """Compare, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("runs/differential.jsonl"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--source", action="store_true")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        print(draw_case(options.seed).source)
        if options.source:
            return 0
        [row] = run([options.seed], None)
        print(json.dumps(row, indent=2))
        return 0 if row["outcome"] in GOOD else 1
    wanted = range(options.first, options.first + options.count)
    done = known(options.results)
    if not options.summary:
        done |= {row["seed"]: row for row in run([seed for seed in wanted if seed not in done], options.results)}
    rows = [done[seed] for seed in wanted if seed in done]
    print(summary(rows))
    return 0 if all(row["outcome"] in GOOD for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
