"""What a simulation executes: seconds of passes, bytes between stages, and which stages sum which weights.

A `Workload` is a plan with its graph costed away, so that the simulator itself knows neither operators nor sizes.
`fusionai.simulation.workload_of_plan` makes one of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fusionai.errors import ConfigError
from fusionai.graph.cost import StageCost
from fusionai.scheduling.estimator import backward_s, deferred_s, forward_s, update_s
from fusionai.scheduling.profile import DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """One stage on one machine. Seconds are per microbatch, of the update per step."""

    peer: str
    forward_s: float
    backward_s: float
    in_flight: int
    """Most microbatches between forward and backward; may not rise from a stage to one that it feeds."""
    deferred_s: float = 0.0
    """The part of `backward_s` that follows the sending of the boundary gradients."""
    update_s: float = 0.0
    repeated_bytes: int = 0
    """Bytes of trainable weights that an earlier stage of the machine holds and updates already."""
    state_bytes: int = 0
    """Weights and optimizer states: what a backup needs."""
    memory_bytes: int = 0
    """What a machine must offer to take it."""
    cost: StageCost | None = None
    """From which its seconds on another machine follow; None where they are given."""


@dataclass(frozen=True, slots=True)
class EdgeLoad:
    """Bytes of one microbatch from stage `source` of a pipeline to its later stage `target`."""

    source: int
    target: int
    forward_bytes: float
    backward_bytes: float | None
    """Bytes of the gradients; None when none travel."""


@dataclass(frozen=True, slots=True)
class PipelineLoad:
    """One pipeline and its share of a step's microbatches."""

    stages: tuple[StageLoad, ...]
    edges: tuple[EdgeLoad, ...]
    microbatches: int


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Trainable weights that the same stages hold: their gradients are summed together at the end of a step."""

    stages: tuple[tuple[int, int], ...]
    """Pipeline and stage of every holder."""
    size_bytes: float


MoveStage = Callable[[StageLoad, str], StageLoad]
"""Returns what a stage takes on another machine, which is given by its peer."""


def unchanged(load: StageLoad, peer: str) -> StageLoad:
    """Return the stage on `peer` as if that machine were like the one before."""
    return replace(load, peer=peer)


def estimated(devices: Mapping[str, DeviceProfile], precision: str, optimizer_states: int) -> MoveStage:
    """Return how a stage with a cost moves: with the planner's own estimator (`fusionai.scheduling.estimator`).

    The result raises ConfigError for a machine that `devices` lacks, PlacementError for one without rates.
    """

    def move(load: StageLoad, peer: str) -> StageLoad:
        if (device := devices.get(peer)) is None:
            raise ConfigError(f"the devices to simulate lack {peer!r}; give the profile of every machine of the plan")
        if (cost := load.cost) is None:
            return unchanged(load, peer)
        whole_s = backward_s(cost, device, precision)
        return replace(
            load,
            peer=peer,
            forward_s=forward_s(cost, device, precision),
            backward_s=whole_s,
            deferred_s=min(whole_s, deferred_s(cost, device, precision)),
            update_s=update_s(cost.trainable_bytes - load.repeated_bytes, device, optimizer_states),
        )

    return move


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that one step does."""

    pipelines: tuple[PipelineLoad, ...]
    groups: tuple[WeightGroup, ...] = ()
    driver: str = ""
    """Peer of the machine that begins and commits steps, and keeps the job's state: the owner's; "" if elsewhere."""
    state_copies: int = 1
    """State of a trainable weight over its size: itself and the optimizer's tensors."""
    move: MoveStage = unchanged

    @property
    def microbatches(self) -> int:
        """Return the microbatches of a step."""
        return sum(pipeline.microbatches for pipeline in self.pipelines)

    @property
    def peers(self) -> tuple[str, ...]:
        """Return the machines that take part, in the order of pipelines and stages."""
        return tuple(dict.fromkeys(stage.peer for pipeline in self.pipelines for stage in pipeline.stages))
