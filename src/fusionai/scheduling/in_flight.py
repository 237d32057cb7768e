"""How many microbatches the stages of a pipeline hold between forward and backward.

1F1B needs as many as there are stages to go, so that the first backward finds every stage at work (Narayanan et al.
2021, section 2.2). Where tensors take time to travel a stage needs more: by Little's law it passes at most
held / (seconds from a microbatch's forward to the end of its backward) microbatches a second. Each stage holds what it
needs or what its machine has room for, whichever is less; to hold more than the stage before it is of no use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusionai.scheduling.pipeline import Edge, StageTimes

SLACKS = (1.0, 2.0)
"""Slacks that are tried one after the other: stages that are equally busy wait for each other now and then."""

WORTH_MEMORY = 0.995
"""More microbatches in flight are kept only if they bring a round below this share of what it took."""


def least_held(most: Sequence[int], limit: int) -> tuple[int, ...]:
    """Return what 1F1B asks for, no more than `limit` and each stage's `most`; at least 1."""
    held: list[int] = []
    for stage, room in enumerate(most):
        before = held[-1] if held else limit
        held.append(max(1, min(before, room, len(most) - stage)))
    return tuple(held)


def widened(
    held: Sequence[int], most: Sequence[int], limit: int, trips_s: Sequence[float], period_s: float, slack: float
) -> tuple[int, ...]:
    """Return what stages must hold to be busy while a microbatch is on its way to the end and back.

    Args:
        held: by stage, what it holds in any case.
        most: by stage, what its machine has room for.
        limit: for all stages.
        trips_s: by stage, see `round_trips_s`.
        period_s: seconds between one microbatch and the next of whatever is busiest.
        slack: times as many as would do if nothing ever waited for anything else.
    """
    if not 0 < period_s < math.inf:
        return tuple(held)
    found: list[int] = []
    for stage, least in enumerate(held):
        last = stage + 1 == len(held)
        wanted = least if last else max(least, math.ceil(slack * trips_s[stage] / period_s))
        before = found[-1] if found else limit
        found.append(max(least, min(wanted, before, most[stage])))
    return tuple(found)


def round_trips_s(stages: Sequence[StageTimes], edges: Sequence[Edge]) -> list[float]:
    """Return, by stage, the seconds from a microbatch's forward to the end of its backward when nobody waits."""
    onward = [0.0] * len(stages)
    for edge in sorted(edges, key=lambda edge: -edge.target):
        target = stages[edge.target]
        there_s = target.forward_s + target.backward_s - target.deferred_s + onward[edge.target]
        away_s = there_s + edge.forward_s + 2 * edge.delay_s + (edge.backward_s or 0.0)
        onward[edge.source] = max(onward[edge.source], away_s)
    return [stage.forward_s + stage.backward_s + away_s for stage, away_s in zip(stages, onward, strict=True)]


def busiest_s(stages: Sequence[StageTimes], edges: Sequence[Edge]) -> float:
    """Return the seconds of a microbatch that the busiest machine or link is occupied: no round is faster."""
    busy: dict[object, float] = {}
    for stage in stages:
        busy[stage.machine] = busy.get(stage.machine, 0.0) + stage.forward_s + stage.backward_s
    for edge in edges:
        here, there = stages[edge.source].machine, stages[edge.target].machine
        if here == there:
            continue
        for ends, seconds, lines_s in (
            ((here, there), edge.forward_s, edge.forward_lines_s),
            ((there, here), edge.backward_s or 0.0, edge.backward_lines_s),
        ):
            keys = ends, (ends[0], "up"), (ends[1], "down")
            for key, more_s in zip(keys, (seconds, *lines_s), strict=True):
                busy[key] = busy.get(key, 0.0) + more_s
    return max(busy.values())
