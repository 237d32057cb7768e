"""What became of a new plan for a running job, for observers and for metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionai.scheduling.plan import Plan
from fusionai.training.machine import Machine


@dataclass(frozen=True, slots=True)
class ReplanEvent:
    """A new plan was taken, or could not be."""

    step: int
    """Steps done before."""
    noticed_step: int
    """Steps done when the reason was noticed, and a new plan asked for."""
    reason: str
    """What was noticed, and why the new plan is better."""
    error: str | None
    """Why the job goes on by the old plan after all; None: the new one runs."""
    plan: Plan
    """The one that runs now."""
    machines: Sequence[Machine]
    names: Mapping[str, str]
    gain_s: float
    """Predicted, over the steps left."""
    bytes_moved: int
    """Weights and optimizer states that went between machines."""
    pause_s: float
    """Time between two steps that the hand-over took."""

    def record(self) -> dict[str, Any]:
        """Return the event for metrics.jsonl."""
        return {
            "step": self.step,
            "replan": {
                "taken": self.error is None,
                "noticed_step": self.noticed_step,
                "reason": self.reason,
                "error": self.error,
                "predicted_gain_s": self.gain_s,
                "bytes_moved": self.bytes_moved,
                "pause_s": self.pause_s,
                "compnodes": [each.name for each in self.machines],
            },
        }
