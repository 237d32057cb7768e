"""What is known of a job whose stages several machines may hold: seconds, bytes, memory and links, as tables.

Array suffixes: S = stages, N = machines. Machines are numbered as in `peers`, stages along the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fusionai.errors import ConfigError
from fusionai.scheduling.links import Floats, Indices

DRIVER = -1
"""Stands for the machine that feeds microbatches where no machine of the job does: nothing takes time from there."""


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Trainable weights that the holders of `stages` keep alike; more than one stage where embeddings are tied."""

    stages: tuple[int, ...]
    size_bytes: float


@dataclass(frozen=True, slots=True, eq=False)
class StageMemory:
    """What stages need of a machine's memory, for those that hold several."""

    fixed_bytes: Floats
    """(S, N): whatever is under way."""
    held_bytes: Floats
    """(S,): for each microbatch between forward and backward."""
    offered_bytes: Floats
    """(N,): the margin of estimates taken off."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoutedJob:
    """A job cut into stages, and what each stage takes on each machine. Raises ConfigError for tables that disagree."""

    peers: tuple[str, ...]
    microbatches: int
    """Of a step."""
    forward_s: Floats
    """(S, N); infinite where a machine cannot hold a stage."""
    backward_s: Floats
    """(S, N)."""
    deferred_s: Floats
    """(S, N): the part of the backward that follows the sending of the boundary gradients."""
    update_s: Floats
    """(S, N), once in a step."""
    in_flight: Indices
    """(S, N): most microbatches between forward and backward that fit; 0 where a machine cannot hold a stage."""
    forward_bytes: tuple[float, ...]
    """By stage: what enters it with each microbatch; of the first stage, from the driver."""
    gradient_bytes: tuple[float, ...]
    """By stage: what leaves it towards the stage before with each microbatch's backward."""
    state_bytes: tuple[float, ...]
    """By stage: weights and optimizer states, which a new holder needs."""
    weights: tuple[SharedWeights, ...]
    bandwidth: Floats
    """(N, N): bytes per second, 0 where no link is possible, infinite within a machine."""
    delay_s: Floats
    """(N, N): one-way latency."""
    driver: int = DRIVER
    """Machine that feeds microbatches and commits steps."""
    pinned: frozenset[int] = field(default_factory=frozenset)
    """Stages that only the driver may hold."""
    memory: StageMemory | None = None
    """None: no machine may hold two stages, but for the driver's pinned ones."""

    def __post_init__(self) -> None:
        stages, machines = self.stages, len(self.peers)
        for name in ("forward_s", "backward_s", "deferred_s", "update_s", "in_flight"):
            if getattr(self, name).shape != (stages, machines):
                raise ConfigError(f"{name} has shape {getattr(self, name).shape}, but needs {(stages, machines)}")
        for name in ("bandwidth", "delay_s"):
            if getattr(self, name).shape != (machines, machines):
                raise ConfigError(f"{name} has shape {getattr(self, name).shape}, but needs {(machines, machines)}")
        if {len(self.gradient_bytes), len(self.state_bytes)} != {stages}:
            raise ConfigError(f"gradient_bytes and state_bytes need {stages} values, one for each stage")
        if self.microbatches < 1:
            raise ConfigError(f"microbatches must be at least 1, got {self.microbatches}")

    @property
    def stages(self) -> int:
        """Return the number S of stages."""
        return len(self.forward_bytes)

    def possible(self, stage: int, machine: int) -> bool:
        """Whether a machine has the memory for a stage."""
        return bool(self.in_flight[stage, machine] > 0)

    def room(self, stage: int, machine: int, stages: Iterable[int]) -> int:
        """Return how many microbatches of `stage` a machine may hold that holds all of `stages`: of each equally many.

        0 where the stages do not fit together.
        """
        alone = int(self.in_flight[stage, machine])
        together = sorted({stage, *stages} - self.pinned)
        if stage in self.pinned or len(together) < 2:
            return alone
        if self.memory is None or not all(self.possible(each, machine) for each in together):
            return 0
        spare = float(self.memory.offered_bytes[machine] - self.memory.fixed_bytes[together, machine].sum())
        held = float(self.memory.held_bytes[together].sum())
        if spare < held:
            return 0
        return min(alone, int(spare / held)) if held else alone

    def pass_s(self, stage: int, machine: int) -> float:
        """Return the seconds of a microbatch's forward and backward."""
        return float(self.forward_s[stage, machine] + self.backward_s[stage, machine])

    def state_s(self, source: int, target: int, stage: int) -> float:
        """Return the seconds in which a stage's state gets from one machine to another, the link to itself."""
        if source in (target, DRIVER):
            return 0.0
        rate = float(self.bandwidth[source, target])
        return self.state_bytes[stage] / rate + float(self.delay_s[source, target]) if rate > 0 else math.inf

    def sum_s(self, holders: Sequence[Sequence[int]]) -> float:
        """Return the seconds of summing all gradients among the holders of each stage; see `ring_s`.

        A machine that holds several weights sums them one after the other. Infinite where a ring has no link.
        """
        until: dict[int, float] = {}
        for group in self.weights:
            ring = ring_of(group, holders)
            if len(ring) > 1:
                start_s = max(until.get(machine, 0.0) for machine in ring)
                until |= dict.fromkeys(ring, start_s + self.ring_s(ring, group.size_bytes))
        return max(until.values(), default=0.0)

    def ring_s(self, ring: Sequence[int], size_bytes: float) -> float:
        """Return the seconds of a ring all-reduce: 2 (R - 1) rounds of 1 / R of the bytes over the slowest link.

        Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
        """
        one = np.asarray(ring)
        other = np.roll(one, -1)
        rate, count = float(self.bandwidth[one, other].min()), len(ring)
        if rate <= 0:
            return math.inf
        piece_s = size_bytes / count / rate
        return 2 * (count - 1) * float((piece_s + self.delay_s[one, other]).max())


def ring_of(group: SharedWeights, holders: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the machines that keep a group's weights, each once, in the order of the machines' numbers.

    Pools list machines of a cluster next to each other; an order made for the links is the caller's to choose by
    numbering machines so.
    """
    return tuple(sorted({machine for stage in group.stages for machine in holders[stage]}))
