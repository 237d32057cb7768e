"""Round trips between machines that never met, from a few that were measured: network coordinates.

Every machine gets a point and a height such that the round trip of two is the distance of their points plus both
heights: the points stand for the core of the net, a height for a machine's own access line. That is the model of
Vivaldi (Dabek, Cox, Kaashoek, Morris, SIGCOMM 2004, sections 2.6 and 5.4). Vivaldi lets each machine move by itself as
measures come in; here all measures are in one place, so the same springs are relaxed for all machines at once, by
gradient steps on the relative errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.links import Floats, Indices

DIMENSIONS = 3
"""Two for the globe's surface, one for detours; with few probes, more are not determined."""

_ROUNDS = 400
_FIRST_STEP = 0.1
"""In units of the median round trip; steps shrink to a hundredth of it."""
_SOFTENING_S = 2e-3
"""Added to a round trip before errors are taken relative to it: of 0.2 ms, a half is noise."""
_OUTLIER = 0.3
"""Relative error from which a spring pulls no harder: detours and a lying peer's claims do not bend the map."""
_MEMORY = (0.9, 0.99)
"""Decay of the means in Adam (Kingma, Ba, ICLR 2015)."""
_PULL = 0.02
"""Weight of a point's own wish to stay in the middle: it decides only where probes do not."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Points (N, D) and heights (N,), both in seconds."""

    points_ND: Floats
    heights_N: Floats

    def rtts_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the round trips that the coordinates stand for."""
        apart = self.points_ND[sources] - self.points_ND[targets]
        return np.asarray(np.sqrt((apart**2).sum(-1)) + self.heights_N[sources] + self.heights_N[targets])


def fit_coordinates(sources: Indices, targets: Indices, rtts_s: Floats, count: int) -> Coordinates:
    """Return coordinates of machines 0 to `count` - 1 from measured pairs; round trips in seconds.

    The same measures give the same coordinates. A machine without any stays in the middle. Springs have local minima:
    one machine in some tens ends in a wrong place even if the measures fit a map exactly.
    """
    if not len(sources):
        return Coordinates(np.zeros((count, DIMENSIONS)), np.zeros(count))
    unit_s = max(float(np.median(rtts_s)), 1e-4)
    measured, softening = rtts_s / unit_s, _SOFTENING_S / unit_s
    scale = 1 / (measured + softening)
    draw = np.random.default_rng(0)
    # Heights are squares, so that none is negative.
    state = np.concatenate([draw.normal(0, 0.3, (count, DIMENSIONS)), np.full((count, 1), 0.3)], axis=1)
    mean, square = np.zeros_like(state), np.zeros_like(state)
    ends = np.concatenate([sources, targets])
    degree = np.maximum(np.bincount(ends, minlength=count), 1)[:, None]
    for step in range(1, _ROUNDS + 1):
        points, roots = state[:, :-1], state[:, -1]
        apart = points[sources] - points[targets]
        distance = np.sqrt((apart**2).sum(1) + 1e-12)
        error = (distance + roots[sources] ** 2 + roots[targets] ** 2 - measured) * scale
        pull = np.clip(error, -_OUTLIER, _OUTLIER) * scale
        along = apart * (pull / distance)[:, None]
        parts = [np.concatenate([along[:, axis], -along[:, axis]]) for axis in range(DIMENSIONS)]
        parts.append(np.concatenate([2 * roots[sources] * pull, 2 * roots[targets] * pull]))
        gradient = np.stack([np.bincount(ends, part, count) for part in parts], axis=1) / degree
        gradient[:, :-1] += _PULL * points / degree
        mean = _MEMORY[0] * mean + (1 - _MEMORY[0]) * gradient
        square = _MEMORY[1] * square + (1 - _MEMORY[1]) * gradient**2
        corrected = mean / (1 - _MEMORY[0] ** step), square / (1 - _MEMORY[1] ** step)
        rate = _FIRST_STEP * 0.01 ** (step / _ROUNDS)
        state = state - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return Coordinates(state[:, :-1] * unit_s, state[:, -1] ** 2 * unit_s)
