"""How fast a pipeline of equal machines goes: its period in closed form, and how many microbatches its stages hold.

The period is what the busiest machine or link needs for a microbatch, or what memory for microbatches on their way
allows. A card has one uplink: its outputs and the gradients that it returns follow each other there.

Array suffixes: P = positions of the line, S = stages, each a range between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.links import Floats, Indices

_HALVINGS = 14
_SHORTER = 0.7
"""Share of the period for which a variant holds microbatches."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostLine:
    """The line of a model for one size of microbatch, on one kind of machine and link. Ranges [i, j) are tables."""

    forward_s_PP: Floats
    """Packing and unpacking included, as in the backward."""
    backward_s_PP: Floats
    deferred_s_PP: Floats
    """The part of the backward that follows the sending of its gradients."""
    out_s_P: Floats
    """For which the outputs at a position occupy a link; 0 at both ends."""
    back_s_P: Floats
    """The same for gradients."""
    delay_s: float
    """There and, where gradients return, back."""
    weight_bytes_P: Floats
    """Bytes of all weights before a position."""
    fixed_bytes_PP: Floats
    flight_bytes_PP: Floats
    budget_bytes: float
    """Bytes that a machine may take; infinite where memory is not heeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePace:
    """What a microbatch takes on the stages of a pipeline."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    deferred_s: tuple[float, ...]
    in_flight: tuple[int, ...]
    """Microbatches that each stage holds; never more than the stage before."""
    period_s: float
    latency_s: float
    """From the first forward to the first stage's backward, alone in the pipeline."""
    limit: str


def pace(line: CostLine, bounds: Sequence[int]) -> PipelinePace:
    """Return the pace of the stages between `bounds`, many microbatches given, with as few in flight as it needs.

    In 1F1B a stage's forward i + w follows its backward i, w being the microbatches that it holds, and a later stage's
    backward i follows its forward i + w' - 1. That makes a cycle of all computing and ways from the one to the other
    and back, once in w - w' + 1 microbatches. The period is the shortest for which all stages have memory.
    """
    starts, stops, cuts = np.asarray(bounds[:-1]), np.asarray(bounds[1:]), np.asarray(bounds[1:-1], dtype=np.int64)
    forward_S, backward_S = line.forward_s_PP[starts, stops], line.backward_s_PP[starts, stops]
    deferred_S = line.deferred_s_PP[starts, stops]
    up_s = line.out_s_P[stops] + line.back_s_P[starts]
    down_s = line.out_s_P[starts] + line.back_s_P[stops]
    machine_s, link_s = float((forward_S + backward_S).max()), float(np.maximum(up_s, down_s).max())
    period_s, limit = (machine_s, "computing") if machine_s >= link_s else (link_s, "links between stages")
    cycle_SS = _cycles(line, cuts, forward_S, backward_S, deferred_S)
    most_S = _most_held(line, starts, stops)
    held = _held(cycle_SS, period_s)
    if (held > most_S).any():
        fast_s, slow_s = period_s, float(cycle_SS[0].max())
        for _ in range(_HALVINGS):
            middle_s = math.sqrt(fast_s * slow_s)
            if (_held(cycle_SS, middle_s) > most_S).any():
                fast_s = middle_s
            else:
                slow_s = middle_s
        if slow_s > 1.1 * period_s:
            limit = "memory for microbatches on their way"
        period_s, held = slow_s, _held(cycle_SS, slow_s)
    return PipelinePace(
        forward_s=tuple(forward_S.tolist()),
        backward_s=tuple(backward_S.tolist()),
        deferred_s=tuple(deferred_S.tolist()),
        in_flight=tuple(int(each) for each in held),
        period_s=period_s,
        latency_s=float(cycle_SS[0, -1]),
        limit=limit,
    )


def with_more_in_flight(line: CostLine, bounds: Sequence[int], found: PipelinePace) -> list[tuple[int, ...]]:
    """Return other microbatches in flight than those of the closed form: more of them, where memory allows.

    Tensors that meet on an uplink wait for each other, which the closed form leaves out: more in flight hide that. One
    way is at least one more than in the next stage, as in plain 1F1B, the other what a shorter period would need.
    """
    starts, stops, cuts = np.asarray(bounds[:-1]), np.asarray(bounds[1:]), np.asarray(bounds[1:-1], dtype=np.int64)
    most_S, rising = _most_held(line, starts, stops), np.asarray(found.in_flight, dtype=np.float64)
    for stage in range(len(rising) - 2, -1, -1):
        rising[stage] = min(most_S[stage], max(rising[stage], rising[stage + 1] + 1))
    rising = np.minimum.accumulate(rising)
    parts = (np.asarray(each) for each in (found.forward_s, found.backward_s, found.deferred_s))
    shorter = _held(_cycles(line, cuts, *parts), _SHORTER * found.period_s)
    tried = [rising] + ([shorter] if (shorter <= most_S).all() else [])
    ways = [tuple(int(each) for each in held) for held in tried]
    return [way for way in dict.fromkeys(ways) if way != found.in_flight]


def _most_held(line: CostLine, starts: Indices, stops: Indices) -> Floats:
    """Return the microbatches for which each stage has memory."""
    spare = line.budget_bytes - line.fixed_bytes_PP[starts, stops]
    flight = line.flight_bytes_PP[starts, stops]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(flight > 0, np.floor(spare / flight), np.inf), dtype=np.float64)


def _cycles(line: CostLine, cuts: Indices, forward_S: Floats, backward_S: Floats, deferred_S: Floats) -> Floats:
    """Return (S, S): the seconds from stage k's forward through stage l >= k and back to the end of k's backward."""
    hop = line.out_s_P[cuts] + line.back_s_P[cuts] + line.delay_s
    both = forward_S + backward_S
    # tail[l]: all of the stages after the first one through l, with the ways there and back.
    tail_S = np.concatenate([[0.0], np.cumsum(both[1:] - deferred_S[1:] + hop)])
    cycle_SS = tail_S[None] - tail_S[:, None] + both[:, None]
    # The gradient that a stage returns is on its uplink before the next output.
    returned_S = np.concatenate([[0.0], line.back_s_P[cuts]])
    cycle_SS = cycle_SS + np.maximum(0.0, returned_S - deferred_S - forward_S)[:, None]
    return np.asarray(np.where(np.tri(len(both), k=-1, dtype=bool), 0.0, cycle_SS), dtype=np.float64)


def _held(cycle_SS: Floats, period_s: float) -> Floats:
    """Return the fewest microbatches that stages may hold for a period."""
    extra = np.ceil(cycle_SS / period_s * (1 - _ROUNDING)) - 1
    held = np.ones(len(cycle_SS))
    for stage in range(len(held) - 2, -1, -1):
        later = held[stage + 1 :]
        held[stage] = max(later[0], float((later + extra[stage, stage + 1 :]).max()))
    return held
