"""Where to cut a line for machines that are all alike, so that the period is least and memory suffices.

Found by bisection on the period. For one period stages are laid from the end of the line, each as long as computing,
links and memory let it be: how many microbatches a stage holds follows from the stages after it, which are there by
then. Longest stages are the fewest, with the fewest ways between them, and so those before hold least. Not exact: a
shorter stage may end where less crosses, or spare all before it a microbatch. So callers also try the narrowest
positions only, and stages that hold at most one microbatch more than the next.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusionai.scheduling.links import Floats
from fusionai.simulation.headline.pace import CostLine

Flags: TypeAlias = NDArray[np.bool_]

_PRECISION = 0.01
"""Relative, of the period."""

_ROUNDING = 1e-9


def narrow_positions(line: CostLine, count: int) -> Flags:
    """Return which positions are among the `count` at which least crosses, or as narrow as those; the ends are."""
    crossing = line.out_s_P + line.back_s_P
    inner = np.sort(crossing[1:-1])
    narrow = crossing <= inner[min(count, len(inner)) - 1] * 1.01 if len(inner) else np.ones(len(crossing), dtype=bool)
    narrow[[0, -1]] = True
    return np.asarray(narrow, dtype=np.bool_)


def bounds_of(
    line: CostLine,
    stages: int,
    allowed_P: Flags,
    *,
    microbatches: int,
    worth_s: float = math.inf,
    most_weight_bytes: float = math.inf,
    most_more: float = math.inf,
) -> list[int] | None:
    """Return the positions of a partition into at most `stages`; None if none fits, or none with a period `worth_s`.

    Args:
        line: the model on a kind of machine and link.
        stages: at most.
        allowed_P: where may be cut.
        microbatches: of a pipeline, the most that a stage ever holds.
        worth_s: longest period of interest.
        most_weight_bytes: of a stage: gradients of the largest one take longest to sum.
        most_more: microbatches that a stage may hold beyond those of the next one, where a shorter stage needs fewer.
    """
    weights = line.weight_bytes_P
    heavy_PP = weights[None] - weights[:, None] > most_weight_bytes
    both_PP = np.where(heavy_PP, np.inf, line.forward_s_PP + line.backward_s_PP)
    computing_s = float(line.forward_s_PP[0, -1] + line.backward_s_PP[0, -1])
    slow_s = float(computing_s + (line.out_s_P + line.back_s_P + line.delay_s).sum())
    slow_s = min(slow_s, worth_s)
    if (found := _laid(line, both_PP, stages, allowed_P, microbatches, slow_s, most_more)) is None:
        return None
    fast_s = computing_s / stages * (1 - _ROUNDING)
    while slow_s > fast_s * (1 + _PRECISION):
        middle_s = math.sqrt(fast_s * slow_s)
        if (tried := _laid(line, both_PP, stages, allowed_P, microbatches, middle_s, most_more)) is None:
            fast_s = middle_s
        else:
            slow_s, found = middle_s, tried
    return found


def _laid(
    line: CostLine,
    both_PP: Floats,
    stages: int,
    allowed_P: Flags,
    microbatches: int,
    period_s: float,
    most_more: float,
) -> list[int] | None:
    """Return the positions of a partition of this period, None if there is none with longest stages."""
    out, back = line.out_s_P, line.back_s_P
    stop, bounds = len(out) - 1, [len(out) - 1]
    # By stage laid: what it holds, and the seconds from the start of the line's next stage's way through it and back.
    held_L, tail_L = np.ones(0), np.ones(0)
    for _ in range(stages):
        starts = slice(0, stop)
        possible = (
            allowed_P[starts]
            & (both_PP[starts, stop] <= period_s)
            & (out[stop] + back[starts] <= period_s)
            & (out[starts] + back[stop] <= period_s)
            & (line.fixed_bytes_PP[starts, stop] + line.flight_bytes_PP[starts, stop] <= line.budget_bytes)
        )
        candidates = np.flatnonzero(possible)
        if not len(candidates):
            return None
        held = np.ones(len(candidates))
        if len(held_L):
            wait = np.maximum(
                0.0, back[candidates] - line.deferred_s_PP[candidates, stop] - line.forward_s_PP[candidates, stop]
            )
            cycle = (both_PP[candidates, stop] + wait)[:, None] + (tail_L + out[stop] + back[stop] + line.delay_s)
            wanted = (held_L + np.ceil(cycle / period_s * (1 - _ROUNDING)) - 1).max(axis=1)
            held = np.minimum(np.maximum(wanted, held_L[-1]), microbatches)
            need = line.fixed_bytes_PP[candidates, stop] + held * line.flight_bytes_PP[candidates, stop]
            fits = np.flatnonzero(need <= line.budget_bytes)
            if not len(fits):
                return None
            if len(few := fits[held[fits] <= held_L[-1] + most_more]):
                fits = few
            candidates, held = candidates[fits], held[fits]
        start = int(candidates[0])
        tail_L = tail_L + out[stop] + back[stop] + line.delay_s if len(tail_L) else tail_L
        own_s = float(both_PP[start, stop] - line.deferred_s_PP[start, stop])
        tail_L, held_L = np.append(tail_L, 0.0) + own_s, np.append(held_L, held[0])
        bounds.append(start)
        if start == 0:
            return bounds[::-1]
        stop = start
    return None
