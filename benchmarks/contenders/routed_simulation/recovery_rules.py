"""How deaths become known and what is done again after one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fusionai.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRules:
    """Raises ConfigError for negative times and a snapshot interval below 1."""

    noticed_by: Literal["reset", "timeout"]
    """"reset": everybody knows of a death `detection_s` after it, by a reset connection or missed heartbeats.
    "timeout": whoever waits for an answer finds out for itself; others at `expiry_s`."""
    held: Literal["stage", "microbatch"]
    """What is computed again of a microbatch whose forward a dead machine had done: that stage, from the tensors that
    the neighbours keep, or the whole microbatch."""
    counted: Literal["stage", "microbatch", "forgotten"]
    """The same for gradients that a dead machine had added up; "forgotten": nothing, the step has fewer of them."""
    roll_back: Literal["always", "if faster"]
    """When all holders of a stage are dead: everybody returns to the last snapshot, or only the machine that takes the
    stage over computes the steps since then again, from tensors that the neighbours keep, where that is faster."""
    detection_s: float = 1.0
    expiry_s: float = 10.0
    """After a death, when its announcement has expired: it is no longer chosen, its gradients are missed, and what
    nobody has waited for is given up."""
    snapshot_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("detection_s", "expiry_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.snapshot_steps < 1:
            raise ConfigError(f"snapshot_steps must be at least 1, got {self.snapshot_steps}")

    @property
    def known_after_s(self) -> float:
        """Return after how long a death is known to those who decide who holds what."""
        return self.detection_s if self.noticed_by == "reset" else self.expiry_s


FUSION = RecoveryRules(noticed_by="reset", held="stage", counted="stage", roll_back="if faster")
"""FusionAI's way (docs/routing.md)."""

SWARM = RecoveryRules(noticed_by="timeout", held="stage", counted="microbatch", roll_back="always")
"""As SWARM: a lost stage is computed by another holder; added gradients of a dead machine need other microbatches."""

AGORA = RecoveryRules(noticed_by="timeout", held="microbatch", counted="microbatch", roll_back="always")
"""As Agora: a backward has one attempt, then the microbatch is dropped and done again."""
