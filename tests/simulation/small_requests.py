"""Jobs of a small decoder, and pools, without a file: what forecasts and trials are tested with."""

from __future__ import annotations

from typing import Any

from decoder_graph import SIZES, decoder

from fusionai.owner.pool_file import pool_from
from fusionai.scheduling.problem import PlanLimits, TrainingProblem
from fusionai.simulation.forecast.request import Request
from fusionai.simulation.hardware.what_if_pool import WhatIfPool

GRAPH = decoder(6, hidden=512)


def request(**changes: Any) -> Request:
    fields: dict[str, Any] = {
        "graph": GRAPH,
        "graph_hash": "",
        "sizes": SIZES,
        "front": 0,
        "back": len(GRAPH.nodes),
        "microbatches": 8,
        "optimizer_states": 2,
        "precision": "fp32",
        "privacy": "open",
    }
    own = {name: changes.pop(name) for name in ("tokens_per_step", "machines") if name in changes}
    limits = PlanLimits(**{name: changes.pop(name) for name in ("compnodes", "cuts") if name in changes})
    return Request(
        **{"problem": TrainingProblem(**{**fields, **changes}, limits=limits), "tokens_per_step": 8 * 128, **own}
    )


def private(**changes: Any) -> Request:
    # Embedding in front, head and loss behind.
    return request(front=1, back=len(GRAPH.nodes) - 4, privacy="private", **changes)


def load(*machines: dict[str, Any], mbps: float = 10_000, **tables: Any) -> WhatIfPool:
    lines = {"up_mbps": mbps, "down_mbps": mbps, "matmul_tflops": 1.0, "memory_gb": 8, "memory_gb_per_s": 500}
    given = [{**lines, **each} for each in machines]
    # None leaves a field out.
    kept = [{name: value for name, value in each.items() if value is not None} for each in given]
    found: dict[str, Any] = {"machines": kept, **tables}
    if "owner" in found:
        found["owner"] = {**lines, **found["owner"]}
    return pool_from(found, source="pool.toml")
