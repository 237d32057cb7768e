"""Benchmarks are run by hand and rarely: here they are at least loaded, so that what they import exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

LOAD = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("grpc", "matplotlib"):  # The extras "bench" and "plots".
            raise
"""


def test_every_benchmark_loads() -> None:
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert len(names) > 10
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], cwd=BENCHMARKS, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
