"""What a machine's report of a round may say: it ends up in the owner's decisions and files."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from fusionai.graph.model import SubDag
from fusionai.training.messages import RoundReport

_MOST_BYTES = 1 << 60
_MOST_TEXT = 2000


def flaw(report: RoundReport, subdags: Sequence[SubDag], microbatches: int, peers: Collection[str]) -> str | None:
    """Return what is wrong with the report of a machine that holds `subdags`, None if nothing is.

    Losses and gradients that are not finite are no flaw: they are the job's own trouble, and end it by themselves.
    """
    due = set(range(microbatches)) if any(subdag.loss is not None for subdag in subdags) else set()
    if report.losses.keys() != due:
        return f"losses of {len(report.losses)} microbatches, where {len(due)} are due"
    trained = {weight.key for subdag in subdags for weight in subdag.weights if weight.trainable}
    if not report.norms.keys() <= trained:
        return "norms of gradients of weights that it does not train"
    if any(norm < 0 for norm in report.norms.values()):
        return f"a norm of {min(report.norms.values())}"
    stages = {subdag.index for subdag in subdags}
    if not stages.issuperset(report.forward_s) or not stages.issuperset(report.backward_s):
        return "times of stages that it does not have"
    seconds = (report.busy_s, report.wall_s, *report.forward_s.values(), *report.backward_s.values())
    if not all(math.isfinite(each) and each >= 0 for each in seconds):
        return "times that are none"
    if not report.bytes_sent.keys() <= set(peers):
        return "bytes sent to machines outside the job"
    if not all(0 <= each < _MOST_BYTES for each in (report.memory_bytes, *report.bytes_sent.values())):
        return "numbers of bytes that cannot be"
    return None


def total(figures: Iterable[float]) -> float:
    """Return the exact sum, or nan where there is none because figures are too large or not finite."""
    try:
        return math.fsum(figures)
    except (OverflowError, ValueError):
        return math.nan


def printable(text: str) -> str:
    """Return a stranger's text as one that may go to a terminal: of bounded length, without control characters."""
    return "".join(each if each.isprintable() else " " for each in text[:_MOST_TEXT])
