"""What is to be planned for a pool of many machines, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusionai.errors import PlacementError
from fusionai.graph.model import OpDag, Sizes
from fusionai.scheduling.links import Floats, Indices, LinkModel
from fusionai.scheduling.profile import Member
from fusionai.scheduling.shortage import JOINED, Remedies, no_compnodes


@dataclass(frozen=True, kw_only=True, eq=False)
class SwarmTask:
    """A graph as arranged, machines and links. Nodes [0, front) and [back, N) are the owner's.

    Raises PlacementError for a pool without machines, and for a graph with pins but without an owner to pin to.
    """

    graph: OpDag
    graph_hash: str
    sizes: Sizes
    microbatches: int
    """Of a step."""
    optimizer_states: int
    precision: Literal["fp32", "bf16"]
    members: tuple[Member, ...]
    owner: Member | None
    """None only in an open job whose driver costs nothing."""
    links: LinkModel
    """What each transfer gets alone."""
    privacy: Literal["private", "open"]
    front: int
    back: int
    remedies: Remedies = JOINED
    """What errors advise."""
    lines: tuple[Floats, Floats] | None = None
    """By machine as `links` numbers them, bytes per second of all that it sends together, and of all that it gets;
    None where links share nothing."""

    def __post_init__(self) -> None:
        if not self.members:
            raise no_compnodes(self.remedies)
        if self.pinned and self.owner is None:
            raise PlacementError(
                f"operators before {self.front} and from {self.back} on are pinned to the owner's machine, but no "
                "owner is given; name one, or plan the job as open"
            )

    @property
    def pinned(self) -> bool:
        """Whether some stages are the owner's."""
        return self.front > 0 or self.back < len(self.graph.nodes)

    @cached_property
    def machines(self) -> tuple[Member, ...]:
        """Return the machines in the numbering of `links`."""
        return self.members if self.owner is None else (*self.members, self.owner)

    @property
    def owner_index(self) -> int | None:
        """Return the owner's number."""
        return None if self.owner is None else len(self.members)

    @cached_property
    def dialable(self) -> NDArray[np.bool_]:
        """Return, by machine, whether others can dial it."""
        return np.asarray([each.dialable for each in self.machines])

    @cached_property
    def _all_dialable(self) -> bool:
        return bool(self.dialable.all())

    @cached_property
    def candidates(self) -> Indices:
        """Return the members that can be linked with the owner's machine."""
        everyone = np.arange(len(self.members))
        if self.owner is None or self.owner.dialable:
            return everyone
        return everyone[self.dialable[: len(self.members)]]

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

    def peers(self, machines: Sequence[int]) -> list[str]:
        """Return the peers of machines."""
        return [self.machines[machine].peer for machine in machines]
