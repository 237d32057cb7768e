"""What a simulated run of serving gave."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """Of seconds: mean, median and 95th percentile; all `None` where there was nothing to count."""

    mean_s: float | None
    p50_s: float | None
    p95_s: float | None


class MachineUse(msgspec.Struct, frozen=True):
    """One machine over the measured time."""

    peer: str
    utilisation: float
    """Share of the time that it computed."""
    mean_batch: float
    """Sequences of a decode pass."""
    most_cached: float
    """Largest share of its cache that was reserved at once, over the whole run."""


class ServingReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run, measured between `measured_from_s` and `measured_to_s`."""

    requests: int
    finished: int
    """Over the whole run."""
    measured_from_s: float
    measured_to_s: float
    tokens_per_s: float
    """Generated tokens, the first of each request included."""
    prompt_latency: Spread
    """From a request's arrival to its first token, for requests whose first token came while measured."""
    token_latency: Spread
    """From a token of a request to its next, for next tokens that came while measured."""
    machines: tuple[MachineUse, ...]
    mean_sequences: float
    """Requests that were admitted and not finished, mean while measured."""


def spread_of(seconds: Sequence[float]) -> Spread:
    """Return mean and percentiles; the p-th is the smallest value that p percent of all do not exceed."""
    if not seconds:
        return Spread(None, None, None)
    ordered = sorted(seconds)
    median, late = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return Spread(math.fsum(ordered) / len(ordered), median, late)
