"""What is to be trained, and what an observer and the caller hear of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.model import OpDag
from fusionai.owner.checkpointing import CheckpointFiles
from fusionai.owner.replan_event import ReplanEvent
from fusionai.pool.messages import JobLaunched
from fusionai.training.config import PlacementConfig, TrainingConfig
from fusionai.training.data.batches import Batches
from fusionai.training.driver import RoundResult
from fusionai.training.learning_rate import ScheduleConfig
from fusionai.training.machine import Machine
from fusionai.training.weight_orders import WeightSource


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What is to be trained, captured and ready to submit."""

    name: str
    graph: OpDag
    weights: WeightSource
    """Weights that training starts from; when resuming, optimizer states as "<key>::<state>" too."""
    batches: Batches
    files: CheckpointFiles
    tokens_per_step: int
    """What throughput counts: tokens of a step, or samples where there are no tokens."""
    description: str
    """The job file as run, for the record."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    first_step: int = 0
    """Steps already done by the run that this one resumes."""
    python: bool = False
    """Whether a program handed the job in: then only a program can go on with its run."""


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What an observer hears after each step."""

    step: int
    """Steps done so far."""
    steps: int
    loss: float
    tokens_per_s: float
    """Over the last steps."""
    result: RoundResult
    learning_rate: float
    evaluation: float | None
    """Held-out loss, where this step was followed by an evaluation."""


class TrainingResult(msgspec.Struct, frozen=True):
    """How a run ended; the JSON of `fusionai train --json`."""

    first_loss: float
    final_loss: float
    heldout_loss: float | None
    steps: int
    tokens_per_s: float
    compnodes: tuple[str, ...]
    bytes_sent: int
    """Tensor bytes between machines, both directions, weights and checkpoints not counted."""
    checkpoint: str
    run: str
    job: str
    lab: bool
    """Whether speeds or links were emulated."""
    replans: int = 0
    """How often the job went over to a new plan while it ran."""


class Observer:
    """Hears how a run goes; override what is of interest. Called on the event loop: return quickly."""

    def launched(self, launched: JobLaunched, machines: Sequence[Machine]) -> None:
        """The plan is made and every machine has its share."""

    def ready(self) -> None:
        """Every machine has its weights."""

    def stepped(self, event: StepEvent) -> None:
        """A step is committed."""

    def replanned(self, event: ReplanEvent) -> None:
        """The job went over to a new plan, or one could not be taken."""

    def saved(self, path: str) -> None:
        """A checkpoint is on disk."""

    def stopping(self) -> None:
        """Ctrl-C came: the step under way ends, a checkpoint is written, and the run ends."""
