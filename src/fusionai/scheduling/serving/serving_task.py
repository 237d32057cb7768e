"""What is to be placed, on which machines, and for whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fusionai.errors import ConfigError, PlacementError
from fusionai.scheduling.links import Floats, Indices, LinkModel
from fusionai.scheduling.profile import Member
from fusionai.scheduling.serving.load import ServingLoad
from fusionai.scheduling.serving.serving_model import ServingModel
from fusionai.scheduling.serving.serving_plan import GATEWAY, Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingTask:
    """A model to be served by a pool.

    Machines are numbered as in `fusionai.scheduling.links`: the members, then the owner's machine, on which the gateway
    runs. Array suffixes: N = machines, the gateway the last of them even if it is nobody's.

    Raises:
        PlacementError: no members, or a private task without an owner.
        ConfigError: two machines have the same peer.
    """

    model: ServingModel
    members: tuple[Member, ...]
    links: LinkModel
    load: ServingLoad
    objective: Objective = "throughput"
    owner: Member | None = None
    """None: the gateway costs nothing, neither computing nor links."""
    private: bool = False
    """Embedding and head stay with the owner, so that no peer sees a token."""
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if not self.members:
            raise PlacementError(
                "the pool has no compnodes: run `fusionai join TOKEN` on each machine that is to take part"
            )
        if self.private and self.owner is None:
            raise PlacementError(
                "private serving keeps embedding and head on the owner's machine, but no owner is given; name one, or "
                "serve with private = false"
            )
        peers = [each.peer for each in self.machines]
        if len(set(peers)) < len(peers):
            twice = sorted({peer for peer in peers if peers.count(peer) > 1})
            raise ConfigError(f"members must be different machines, but {', '.join(twice)} appear more than once")

    @property
    def machines(self) -> tuple[Member, ...]:
        """Return all machines in the numbering of the links."""
        return self.members if self.owner is None else (*self.members, self.owner)

    @property
    def gateway(self) -> int:
        """Return the gateway's number."""
        return len(self.members)

    @property
    def gateway_peer(self) -> str:
        """Return the gateway's name in a plan."""
        return GATEWAY if self.owner is None else self.owner.peer

    @property
    def front(self) -> int:
        """Return the position from which on peers may hold the model."""
        return 1 if self.private else 0

    @property
    def back(self) -> int:
        """Return the position up to which peers may hold it."""
        return len(self.model.flops_S) - (1 if self.private else 0)

    @cached_property
    def linked_NN(self) -> NDArray[np.bool_]:
        """Return which machines can be linked: one side must be dialable."""
        dialable = np.asarray([*(each.dialable for each in self.machines), *([True] if self.owner is None else [])])
        linked = np.asarray(dialable[:, None] | dialable[None])
        np.fill_diagonal(linked, False)
        return linked

    @cached_property
    def bandwidth_NN(self) -> Floats:
        """Return bytes per second from one machine to another; 0 where there is no link."""
        return np.where(self.linked_NN, self._among_machines(self.links.bandwidths_bytes_per_s, np.inf), 0.0)

    @cached_property
    def delay_NN(self) -> Floats:
        """Return one-way latencies in seconds; infinite where there is no link."""
        return np.where(self.linked_NN, self._among_machines(self.links.rtts_s, 0.0) / 2, np.inf)

    def _among_machines(self, figures: Callable[[Indices, Indices], Floats], free: float) -> Floats:
        """Return figures of all links, `free` for those of a gateway that costs nothing."""
        index = np.arange(len(self.machines))
        found = np.full((self.gateway + 1, self.gateway + 1), free)
        known = np.broadcast_to(figures(index[:, None], index[None]), (len(index), len(index)))
        found[: len(index), : len(index)] = known
        return found
