"""What a machine holds of a job: the part that does not change while it holds it."""

from __future__ import annotations

import msgspec

from fusionai.execution.plane import ProgramOptions
from fusionai.graph.model import SubDag, Weight, WeightKey
from fusionai.pool.identifiers import JobId


class Share(msgspec.Struct, frozen=True):
    """One machine's stages of a job, weights apart. Made once; whatever may change is in the `Roster`."""

    job: JobId
    subdags: tuple[SubDag, ...]
    """Empty on a machine that only drives the job or gives weights away."""
    in_flight: dict[int, int]
    """Stage to the most microbatches it may hold between forward and backward."""
    options: ProgramOptions
    memory_bytes: int
    """Memory that the plan reckons with on this machine."""

    def subdag(self, stage: int) -> SubDag | None:
        """Return the sub-DAG of a stage, None where the stage is not on this machine."""
        return next((each for each in self.subdags if each.index == stage), None)

    def weights(self) -> dict[WeightKey, Weight]:
        """Return every weight of the share by its key; a weight that several stages use is there once."""
        return {weight.key: weight for subdag in self.subdags for weight in subdag.weights}
