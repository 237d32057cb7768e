"""The OP-DAG as a line of small segments between possible cuts, costed once; ranges of it are sums.

Array suffixes: P = positions (cuts considered, both ends included), D = devices, E = D + 1 (devices, then the outside).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fusionai.graph.cost import StageCost
from fusionai.graph.cuts import Cutter
from fusionai.graph.model import OpDag, Sizes, SubDag
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.profile import Member

Floats = NDArray[np.float64]

MEMORY_MARGIN = 1.15
"""What a device must offer over the estimate: the bound that measured peaks are tested against."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Costs of the segments between positions, and the bytes that cross each position."""

    positions: tuple[int, ...]
    """P node positions, rising; the first and last are the ends of what may be distributed."""
    costs: tuple[StageCost, ...]
    """Costs of the P-1 segments."""
    outer: tuple[StageCost, ...]
    """Costs of the owner's stages before and after; empty when nothing is pinned."""
    outer_after: int
    """How many of them come after."""
    fixed_bytes_PP: Floats
    flight_bytes_PP: Floats
    forward_bytes_P: Floats
    gradient_bytes_P: Floats


def make_segments(
    graph: OpDag, sizes: Sizes, positions: Sequence[int], *, optimizer_states: int, cutter: Cutter | None = None
) -> Segments:
    """Cost the graph between `positions`; what is before the first and after the last one is the owner's.

    `cutter`: the graph's, where there is one.
    """
    last, cutter = len(graph.nodes), cutter or Cutter(graph)
    subdags = cutter.cut([position for position in positions if 0 < position < last])
    costs = cutter.costs(sizes).stages(subdags)
    before, after = int(positions[0] > 0), int(positions[-1] < last)
    stop = len(subdags) - after
    middle = subdags[before:stop]
    fixed_PP, flight_PP = _memory(middle, costs[before:stop], sizes, optimizer_states)
    forward_P, gradient_P = _crossing(subdags, before, len(middle), sizes)
    return Segments(
        tuple(positions),
        tuple(costs[before:stop]),
        (*costs[:before], *costs[stop:]),
        after,
        fixed_PP,
        flight_PP,
        forward_P,
        gradient_P,
    )


def _ranges(parts: Sequence[float]) -> Floats:
    """Return sums over [i, j) as a (P, P) table, inf where the range is empty."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(parts, dtype=np.float64))])
    return np.where(np.tri(len(total), dtype=bool), np.inf, total[None] - total[:, None])


def _memory(
    subdags: Sequence[SubDag], costs: Sequence[StageCost], sizes: Sizes, optimizer_states: int
) -> tuple[Floats, Floats]:
    """Return the bytes of each range: whatever is in flight, and for each microbatch in flight."""
    fixed_PP = _ranges([cost.training_bytes(0, optimizer_states) - cost.transient_bytes for cost in costs])
    flight_PP = _ranges([cost.saved_bytes for cost in costs])
    # A weight that several segments read is held once by a stage that spans them.
    weights: dict[str, tuple[int, list[int]]] = {}
    # So is a tensor between segments, which both sides count.
    kept: dict[str, tuple[int, list[int]]] = {}
    for segment, subdag in enumerate(subdags):
        for weight in {weight.key: weight for weight in subdag.weights}.values():
            copies = 2 + optimizer_states if weight.trainable else 1
            weights.setdefault(weight.key, (copies * type_bytes(weight.type, sizes), []))[1].append(segment)
        boundary = {each.value: each.type for each in (*subdag.receives, *subdag.sends)}
        for value, kind in boundary.items():
            kept.setdefault(value, (type_bytes(kind, sizes), []))[1].append(segment)
    for table_PP, holders in ((fixed_PP, weights), (flight_PP, kept)):
        for held_bytes, segments in holders.values():
            for earlier, later in pairwise(segments):
                table_PP[: earlier + 1, later + 1 :] -= held_bytes
    transient = np.asarray([cost.transient_bytes for cost in costs], dtype=np.float64)
    for start in range(len(costs)):
        fixed_PP[start, start + 1 :] += np.maximum.accumulate(transient[start:])
    return fixed_PP, flight_PP


def _crossing(subdags: Sequence[SubDag], before: int, count: int, sizes: Sizes) -> tuple[Floats, Floats]:
    """Return the bytes that cross each position, forward and as gradients, the owner's own transfers left out."""
    forward_P, gradient_P = np.zeros(count + 1), np.zeros(count + 1)
    for subdag in subdags:
        reach: dict[str, tuple[int, int, bool]] = {}
        for transfer in subdag.sends:
            if transfer.source < before and transfer.target >= before + count:
                continue
            target, _, gradient = reach.get(transfer.value, (0, 0, False))
            reach[transfer.value] = (
                max(target, transfer.target),
                type_bytes(transfer.type, sizes),
                gradient or transfer.gradient,
            )
        first = max(subdag.index + 1 - before, 0)
        for target, size_bytes, gradient in reach.values():
            stop = target - before + 1
            forward_P[first:stop] += size_bytes
            if gradient:
                gradient_P[first:stop] += size_bytes
    return forward_P, gradient_P


def reachable(one: Member, other: Member) -> bool:
    """Whether two machines can be linked: one of them must be dialable."""
    return one.peer == other.peer or one.dialable or other.dialable
