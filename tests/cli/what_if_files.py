"""Job files of small models and pool files, for the commands that plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
OWNER = {"gpu": "RTX 3060", "up_mbps": 1000, "down_mbps": 1000}


def toml(tables: dict[str, Any]) -> str:
    """Return tables as TOML; what it has in common with JSON is all that they hold."""
    lines = []
    for name, fields in tables.items():
        head = f"[[{name}]]" if isinstance(fields, list) else f"[{name}]"
        for each in fields if isinstance(fields, list) else [fields]:
            lines += ["", head, *(f"{field} = {json.dumps(value)}" for field, value in each.items())]
    return "\n".join(lines) + "\n"


def job_file(folder: Path, config: dict[str, Any] | None = None, **tables: dict[str, Any]) -> Path:
    data = {"vocabulary_size": 300, "sequence_length": 32, **tables.pop("data", {})}
    path = folder / "job.toml"
    text = toml({"model.config": LLAMA if config is None else config, "data": data, **tables})
    path.write_text('name = "small"\n' + text, encoding="utf-8")
    return path


def pool_file(folder: Path, *machines: dict[str, Any], owner: dict[str, Any] | None = OWNER) -> Path:
    path = folder / "pool.toml"
    tables: dict[str, Any] = {"machines": list(machines)}
    if owner is not None:
        tables["owner"] = owner
    path.write_text(toml(tables), encoding="utf-8")
    return path


def machine(mbps: float = 1000, **fields: Any) -> dict[str, Any]:
    return {"gpu": "RTX 3080", "up_mbps": mbps, "down_mbps": mbps, **fields}
