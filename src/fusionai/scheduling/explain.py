"""A plan in words: who holds what, and what limits the speed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from fusionai.graph.model import Node
from fusionai.scheduling.plan import StagePlan
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.units.byte_counts import bytes_text
from fusionai.units.durations import seconds_text

_MOST_LISTED = 5
"""Names that a sentence lists one by one, and then runs of names."""

_NUMBERED = re.compile(r"^(?P<prefix>.*?)(?P<number>0|[1-9]\d*)$")

_BLOCK = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)(?:\.|$)")


WITH_MARGIN = f"with a margin of {100 * (MEMORY_MARGIN - 1):.0f} %"
"""What is said once in every text that compares what is needed to what is offered."""


def holding(nodes: Iterable[Node]) -> str:
    """Return the modules that operators came from, such as "model.layers.0-5, model.norm"."""
    blocks: dict[str, list[int]] = {}
    others: list[str] = []
    count = 0
    for node in nodes:
        count += 1
        if match := _BLOCK.match(node.scope):
            blocks.setdefault(match["list"], []).append(int(match["index"]))
        elif node.scope and node.scope not in others:
            others.append(node.scope)
    names = [*blocks, *others]
    # An enclosing module's name says nothing that its parts do not say better.
    inner = [name for name in others if not any(each.startswith(f"{name}.") for each in names)]
    parts = [f"{name}.{_span(indices)}" for name, indices in blocks.items()] + inner
    return ", ".join(parts) or f"{count} operator{'s' if count != 1 else ''}"


def _span(indices: Sequence[int]) -> str:
    low, high = min(indices), max(indices)
    return str(low) if low == high else f"{low}-{high}"


def stage_lines(
    stages: Sequence[StagePlan],
    nodes: Sequence[Node],
    names: Mapping[str, str],
    offers_bytes: Mapping[str, int],
    busy: Mapping[str, float],
) -> tuple[str, ...]:
    """Return a line for each stage; `busy` is the fraction of a step that a machine computes."""
    return tuple(
        f"stage {stage.stage} on {names[stage.peer]}: {holding(nodes[stage.start : stage.stop])}; "
        f"{bytes_text(stage.predicted.memory_bytes)} of {bytes_text(offers_bytes[stage.peer])}, "
        f"{seconds_text(stage.predicted.forward_s + stage.predicted.backward_s)} a microbatch, "
        f"{stage.in_flight} in flight; machine busy {busy.get(stage.peer, 0.0):.0%} of a step"
        for stage in stages
    )


def shortage_texts(need_bytes: float, offered_bytes: int) -> tuple[str, str, str]:
    """Return what is needed, what is offered, and how much less that is, for people.

    The first two get digits enough to show a small difference, either way. Needs are rounded up and offers down: who
    offers what the text says offers enough.
    """
    need = math.ceil(need_bytes)
    missing = need - offered_bytes
    # The last digit is worth at most a tenth of the difference.
    digits = max(3, len(str(need)) - len(str(abs(missing))) + 2)
    up = bytes_text(-_floored(-need, digits), digits)
    return up, bytes_text(_floored(offered_bytes, digits), digits), bytes_text(max(0, -_floored(-missing, 3)))


def _floored(size_bytes: int, digits: int) -> int:
    """Return the next integer towards minus infinity that has so many significant digits."""
    step: int = 10 ** max(0, len(str(abs(size_bytes))) - digits)
    return size_bytes // step * step


def brief_names(names: Sequence[str]) -> str:
    """Return names for a sentence: a few one by one, many in runs: "a-1 to a-30, b-3, 31 in all"."""
    if len(names) <= _MOST_LISTED:
        return ", ".join(names)
    runs = _runs(names)
    shown = [first if first == last else f"{first} to {last}" for first, last, _ in runs[:_MOST_LISTED]]
    rest = sum(count for _, _, count in runs[_MOST_LISTED:])
    return f"{', '.join(shown)}{f' and {rest:,} more' if rest else ''}, {len(names):,} in all"


def _runs(names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return runs of names numbered one after the other, each as its first, its last and their count."""
    found: list[tuple[str, str, int]] = []
    following = ""
    for name in names:
        if name == following:
            first, _, count = found.pop()
            found.append((first, name, count + 1))
        else:
            found.append((name, name, 1))
        numbered = _NUMBERED.match(name)
        following = f"{numbered['prefix']}{int(numbered['number']) + 1}" if numbered else ""
    return found


def left_out_line(spare: Sequence[str], unlinked: Sequence[str], *, chosen: bool) -> tuple[str, ...]:
    """Return lines on the compnodes without a part; `chosen`: the job says how many to use."""
    lines = []
    if spare:
        why = "the job asks for fewer" if chosen else "with more compnodes a step would not be shorter"
        lines.append(f"left out: {brief_names(spare)} ({why})")
    if unlinked:
        lines.append(
            f"left out: {brief_names(unlinked)} (no link with the owner's machine: neither side can be dialled)"
        )
    return tuple(lines)
