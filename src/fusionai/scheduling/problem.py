"""What is to be planned: a graph, how it is trained, on which machines, and what the plan may not do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusionai.errors import ConfigError, PlacementError
from fusionai.graph.model import OpDag, Sizes
from fusionai.scheduling.estimator import update_bytes_per_s
from fusionai.scheduling.links import AssumedLinks, Floats, Indices, LinkModel, PoolLinks
from fusionai.scheduling.pipeline import ExecutedRound
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.scheduling.remedies import JOINED, Remedies
from fusionai.scheduling.stage_costs import StageCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What the job, or its present state, forbids a plan."""

    compnodes: int = 0
    """How many machines besides the owner's a pipeline uses; 0: as many as serve best."""
    cuts: tuple[int, ...] | None = None
    """Node positions at which the distributed part is cut, in place of the planner's own; None: the planner's."""
    in_order: bool = False
    """Whether the members take the parts between `cuts` in their order: then nothing is left to choose."""
    most_pipelines: int | None = None
    """None: any number. The training runtime runs plans of one pipeline."""
    leaving: frozenset[str] = frozenset()
    """Peers that get no stage: they are in the pool only to hand on what they hold."""

    @property
    def one_pipeline(self) -> bool:
        """Whether every plan has one pipeline: a job that names its number of machines, or its cuts, means one."""
        return self.most_pipelines == 1 or self.compnodes > 0 or self.cuts is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingProblem:
    """One planning problem. Machines are numbered: the members in their order, then the owner's machine.

    A problem may be made before its pool is known; `on_pool` gives it machines. A problem without machines has no plan.

    Raises PlacementError if operators are pinned to the owner's machine and members are given without an owner.
    """

    graph: OpDag
    """As arranged for the job's privacy."""
    graph_hash: str
    sizes: Sizes
    microbatches: int
    """Microbatches of one step, over all pipelines."""
    optimizer_states: int
    """Tensors that the optimizer keeps for each trained weight (AdamW: 2)."""
    precision: Literal["fp32", "bf16"]
    privacy: Literal["private", "open"]
    front: int
    back: int
    """Nodes [0, front) and [back, N) run on the owner's machine, in every pipeline."""
    split_backward: bool = True
    """Whether boundary gradients leave a stage before it computes those of its weights. False for a compiled backward,
    which is one piece."""
    members: tuple[Member, ...] = ()
    owner: Member | None = None
    """None only in an open job whose driver costs nothing."""
    links: LinkModel = field(default_factory=AssumedLinks)
    """What each transfer gets when it is alone on its way."""
    lines: tuple[Floats, Floats] | None = None
    """Bytes per second by machine: of all that it sends together, and of all that it receives together. None: links
    share nothing."""
    limits: PlanLimits = PlanLimits()
    remedies: Remedies = JOINED
    """What errors advise."""
    costs: StageCosts = field(default_factory=StageCosts, repr=False)
    """Costs of stages of the graph at these sizes, kept for all plans that are tried."""
    schedules: dict[tuple[object, ...], ExecutedRound] = field(default_factory=dict, repr=False)
    """Schedules that were executed: pipelines of like machines and links have the same."""

    def __post_init__(self) -> None:
        if self.members and self.pinned and self.owner is None:
            raise PlacementError(
                f"operators before {self.front} and from {self.back} on are pinned to the owner's machine, but no "
                "owner is given; name one, or plan the job as open"
            )

    def on_pool(self, pool: Pool, owner: Member) -> TrainingProblem:
        """Return the same problem on the machines and links of `pool`."""
        peers = [*(each.peer for each in pool.members), owner.peer]
        lines = None
        if pool.lines:
            known = [pool.lines.get(peer) for peer in peers]
            lines = (
                np.asarray([each.up_bytes_per_s if each else math.inf for each in known]),
                np.asarray([each.down_bytes_per_s if each else math.inf for each in known]),
            )
        return replace(self, members=pool.members, owner=owner, links=PoolLinks(pool, peers), lines=lines)

    def within(self, limits: PlanLimits) -> TrainingProblem:
        """Return the same problem with other limits."""
        return replace(self, limits=limits)

    # --- machines -----------------------------------------------------------------------------------------------

    @property
    def pinned(self) -> bool:
        """Whether some stages must run on the owner's machine."""
        return self.front > 0 or self.back < len(self.graph.nodes)

    @cached_property
    def machines(self) -> tuple[Member, ...]:
        """Return the machines in the numbering of `links`."""
        return self.members if self.owner is None else (*self.members, self.owner)

    @property
    def owner_index(self) -> int | None:
        """Return the number of the owner's machine."""
        return None if self.owner is None else self.number_of[self.owner.peer]

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Return the numbers of the machines, by peer. A member that is the owner's machine too counts as a member."""
        return {each.peer: number for number, each in reversed(list(enumerate(self.machines)))}

    def member(self, peer: str) -> Member:
        """Return a machine by its peer."""
        return self.machines[self.number_of[peer]]

    @cached_property
    def dialable(self) -> NDArray[np.bool_]:
        """Return, by machine, whether others can dial it."""
        return np.asarray([each.dialable for each in self.machines], dtype=bool)

    @cached_property
    def _all_dialable(self) -> bool:
        return bool(self.dialable.all())

    @cached_property
    def candidates(self) -> Indices:
        """Return the members that may get a stage: those that do not leave and can be linked with the owner's."""
        owner, leaving = self.owner, self.limits.leaving
        return np.asarray(
            [
                number
                for number, each in enumerate(self.members)
                if each.peer not in leaving
                and (owner is None or owner.dialable or each.dialable or each.peer == owner.peer)
            ],
            dtype=np.int64,
        )

    def peers(self, machines: Sequence[int]) -> list[str]:
        """Return the peers of machines."""
        return [self.machines[machine].peer for machine in machines]

    @cached_property
    def update_bytes_per_s(self) -> Floats:
        """Return, by machine, the bandwidth at which it updates weights."""
        return np.asarray([update_bytes_per_s(each.device) for each in self.machines])

    # --- links --------------------------------------------------------------------------------------------------

    def bandwidths(self, sources: Indices | int, targets: Indices | int) -> Floats:
        """Return bytes per second; 0 where no link is possible, infinite within a machine."""
        source, target = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
        found = self.links.bandwidths_bytes_per_s(source, target)
        if not self._all_dialable:
            found = np.where(self.dialable[source] | self.dialable[target], found, 0.0)
        return np.where(source == target, np.inf, found)

    def delays(self, sources: Indices | int, targets: Indices | int) -> Floats:
        """Return one-way latencies in seconds; 0 within a machine."""
        source, target = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
        return np.where(source == target, 0.0, self.links.rtts_s(source, target) / 2)

    @cached_property
    def _known_links(self) -> dict[tuple[int, int], LinkProfile]:
        return {}

    def link(self, source: int, target: int) -> LinkProfile:
        """Return the link between two machines. Its bandwidth is 0 where neither can dial the other."""
        if self.machines[source].peer == self.machines[target].peer:
            return _WITHIN
        if (found := self._known_links.get((source, target))) is None:
            found = LinkProfile(2 * float(self.delays(source, target)), float(self.bandwidths(source, target)))
            self._known_links[source, target] = found
        return found

    def reachable(self, one: int, other: int) -> bool:
        """Whether two machines can be linked: one of them must be dialable."""
        ends = self.machines[one], self.machines[other]
        return ends[0].peer == ends[1].peer or ends[0].dialable or ends[1].dialable

    def lines_s(self, size_bytes: float, source: int, target: int) -> tuple[float, float]:
        """Return the seconds that bytes take the source's uplink and the target's downlink, where they are shared."""
        if self.lines is None or source == target:
            return 0.0, 0.0
        return float(size_bytes / self.lines[0][source]), float(size_bytes / self.lines[1][target])

    def check_limits(self) -> None:
        """Raise ConfigError for cuts that do not agree with the number of machines."""
        limits = self.limits
        if limits.cuts is not None and limits.compnodes not in (0, len(limits.cuts) + 1):
            raise ConfigError(
                f"placement.cuts makes {len(limits.cuts) + 1} stages for compnodes, but placement.compnodes is "
                f"{limits.compnodes}; make them agree, or leave one out"
            )


_WITHIN = LinkProfile(0.0, math.inf)
