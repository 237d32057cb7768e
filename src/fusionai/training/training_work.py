"""Training as a kind of work: what its machines say to each other, and the hosts of its shares."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fusionai.errors import JobError
from fusionai.execution.plane import Plane
from fusionai.network.identity import PeerId
from fusionai.pool.job_wire import JobWire
from fusionai.training.assignment_parcels import Assignment, unpack
from fusionai.training.messages import TRAINING_MESSAGES
from fusionai.training.slowdown import FULL_SPEED, Slowdown
from fusionai.training.stage_host import StageHost


class TrainingWork:
    """Makes the hosts of training's shares. It is a `WorkKind`."""

    name = "training"
    messages = TRAINING_MESSAGES

    def __init__(self, plane: Plane | None, slowdown: Slowdown = FULL_SPEED, *, only_for: PeerId | None = None) -> None:
        """Prepare.

        Args:
            plane: runs the stages; without one every share with a stage is refused.
            slowdown: emulated speed: every pass is stretched by it.
            only_for: the peer whose jobs alone, driven by itself, are worked for; None: anybody's.
        """
        self._plane = plane
        self._slowdown = slowdown
        self._only_for = only_for

    def unpack(self, packed: bytes) -> Assignment:
        """Return a share and its roster, checked. Slow for large sub-DAGs: call it in a thread."""
        return unpack(packed)

    async def host(
        self,
        work: Assignment,
        wire: JobWire,
        *,
        limit_bytes: int,
        on_end: Callable[[str], Awaitable[None]],
    ) -> StageHost | None:
        """Make the program of a share; None where the share has no stage.

        Raises JobError without a plane, for a job of another owner than is worked for, and what `StageHost.create`
        raises.
        """
        if self._only_for not in (None, work.roster.owner) or self._only_for not in (None, work.roster.driver):
            raise JobError(f"this machine works for jobs of {str(self._only_for)[:12]} only, which drives them itself")
        if not work.share.subdags:
            return None
        if self._plane is None:
            raise JobError("this machine has no execution plane; join with one")
        return await StageHost.create(
            work.share,
            work.roster,
            self._plane,
            wire,
            limit_bytes=limit_bytes,
            slowdown=self._slowdown,
            on_end=on_end,
        )
