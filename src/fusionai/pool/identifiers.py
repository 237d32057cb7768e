"""How jobs, and the plans that they go through, are named between the machines of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

JobId = NewType("JobId", str)
"""A job of a pool, as its broker names it."""

Epoch = NewType("Epoch", int)
"""Counts the plans that the broker prepared for a job. A message of an epoch that is over is dropped."""

FIRST_EPOCH = Epoch(0)
"""Epoch of the plan that a job is launched with."""


@dataclass(frozen=True, slots=True, order=True)
class JobEpoch:
    """One plan of one job: what shares, drivers and messages belong to."""

    job: JobId
    epoch: Epoch

    def __str__(self) -> str:
        return f"{self.job} (epoch {self.epoch})"
