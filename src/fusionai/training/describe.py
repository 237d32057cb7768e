"""Describes a stage's contents in one line for people."""

from __future__ import annotations

import re

from fusionai.graph.model import SubDag

_BLOCK = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)(?:\.|$)")


def stage_line(subdag: SubDag) -> str:
    """Return a line such as "stage 1: model.layers.0-5, model.norm", from the module scopes of a stage's operators."""
    blocks: dict[str, list[int]] = {}
    others: list[str] = []
    for node in subdag.nodes:
        if match := _BLOCK.match(node.scope):
            blocks.setdefault(match["list"], []).append(int(match["index"]))
        elif node.scope and node.scope not in others:
            others.append(node.scope)
    parts = [f"{name}.{_span(indices)}" for name, indices in blocks.items()]
    # An enclosing module's scope says nothing that its parts do not say better.
    inner = [*blocks, *others]
    parts += [
        scope
        for scope in others
        if not any(other != scope and other.startswith(f"{scope}.") for other in inner) and scope not in blocks
    ]
    if subdag.loss is not None:
        parts.append("loss")
    return f"stage {subdag.index}: {', '.join(parts) or f'{len(subdag.nodes)} operators'}"


def _span(indices: list[int]) -> str:
    low, high = min(indices), max(indices)
    return str(low) if low == high else f"{low}-{high}"
