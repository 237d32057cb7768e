"""The estimator's rates from timed passes: the inverse of `scheduling.estimator`.

A pass takes FLOPs over the rate of their class, bytes over the bandwidth, and an overhead for each operator. Given
passes whose counts and seconds are known, the rates are those whose passes come closest, by relative error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SWEEPS = 2000
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Timing:
    """One kind of pass: how much work it did, and the median of the seconds it took."""

    amounts: tuple[float, ...]
    """Amount of each kind of work, in one order for all timings; zero where there is none."""
    seconds: float


def solved(timings: Sequence[Timing]) -> tuple[float, ...]:
    """Return the seconds that one unit of each kind of work takes, by non-negative least squares of relative errors.

    A kind of work that occurs in no timing gets 0.
    """
    amounts_TK = np.asarray([timing.amounts for timing in timings], dtype=np.float64)
    seconds_T = np.asarray([timing.seconds for timing in timings], dtype=np.float64)
    share_TK = amounts_TK / seconds_T[:, None]
    # Scaled by each kind's largest share, so that FLOPs (1e9) and operators (1e2) have equal weight.
    scale_K = np.where(share_TK.max(axis=0) > 0, share_TK.max(axis=0), 1.0)
    return tuple((_nonnegative(share_TK / scale_K, np.ones(len(timings))) / scale_K).tolist())


def _nonnegative(matrix_TK: NDArray[np.float64], target_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the x >= 0 of least squares, found one coordinate at a time, which suffices for a few unknowns."""
    gram_KK = matrix_TK.T @ matrix_TK + _RIDGE * np.eye(matrix_TK.shape[1])
    wanted_K = matrix_TK.T @ target_T
    found_K = np.zeros(matrix_TK.shape[1])
    for _ in range(_SWEEPS):
        before_K = found_K.copy()
        for k in range(len(found_K)):
            rest = wanted_K[k] - gram_KK[k] @ found_K + gram_KK[k, k] * found_K[k]
            found_K[k] = max(0.0, rest / gram_KK[k, k])
        if np.abs(found_K - before_K).max() < 1e-12:
            break
    return found_K
