"""Who holds what of a job now: what each machine asks before it sends, and before it believes a sender.

A roster is a value. The next epoch's roster replaces it as a whole; a machine drops messages of older epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fusionai.graph.model import SubDag, WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.contacts import Contact
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId

DRIVER = -1
"""The source of graph inputs, where other tensors name the stage that they come from."""


class Roster(msgspec.Struct, frozen=True):
    """The machines of a job in one epoch, as one of them needs to know them."""

    job: JobId
    epoch: Epoch
    owner: str
    """Peer whose job it is."""
    driver: str
    """Peer that drives the job: only it gives commands and feeds inputs, and it gets the reports."""
    pipelines: tuple[tuple[str, ...], ...]
    """Holder of every stage, by pipeline and stage."""
    sums: dict[WeightKey, tuple[str, ...]]
    """Trainable weights of this machine that others hold too, with all holders, lowest stage first. Gradients are
    summed in the reverse of this order, and the first holder reports the norm."""
    neighbours: tuple[Contact, ...]
    """Machines to hold links with: those that this machine exchanges tensors with, and the driver."""
    handing: tuple[Contact, ...] = ()
    """Further machines to hold links with until weights are handed over: in a new plan of a running job, those that the
    weights of this machine come from or go to."""

    @property
    def plan(self) -> JobEpoch:
        """The job and epoch under which messages travel."""
        return JobEpoch(self.job, self.epoch)

    @property
    def stages(self) -> int:
        """How many stages the longest pipeline has."""
        return max((len(each) for each in self.pipelines), default=0)

    @property
    def contacts(self) -> tuple[Contact, ...]:
        """All machines to hold links with."""
        return (*self.neighbours, *self.handing)

    def holder(self, stage: int, pipeline: int = 0) -> PeerId | None:
        """Return the machine that has a stage, None where there is no such stage."""
        if not 0 <= pipeline < len(self.pipelines) or not 0 <= stage < len(self.pipelines[pipeline]):
            return None
        return PeerId(self.pipelines[pipeline][stage])

    def sender(self, source: int, pipeline: int = 0) -> PeerId | None:
        """Return the machine that may send a source's tensors: a stage's holder, or the driver for `DRIVER`."""
        return PeerId(self.driver) if source == DRIVER else self.holder(source, pipeline)

    def is_driver(self, peer: str) -> bool:
        """Whether a peer drives the job."""
        return peer == self.driver

    def sums_with(self, peer: str, key: WeightKey) -> bool:
        """Whether a peer holds a tied weight of this machine too."""
        return peer in self.sums.get(key, ())

    def answered_elsewhere(self, me: str) -> list[WeightKey]:
        """Return the tied weights whose norms another machine reports."""
        return [key for key, holders in self.sums.items() if holders[0] != me]

    def neighbour(self, peer: str) -> Contact | None:
        """Return the contact of a machine that this one exchanges tensors with, None for any other peer."""
        return next((each for each in self.neighbours if each.peer == peer), None)

    def knows(self, peer: str) -> bool:
        """Whether this machine is to have a link with a peer."""
        return any(each.peer == peer for each in self.contacts)

    def follows(self, other: Roster) -> bool:
        """Whether this roster replaces another one: it is of the same job and of a later epoch."""
        return self.job == other.job and self.epoch > other.epoch


def tied_holders(subdags: Sequence[SubDag], holders: Sequence[str]) -> dict[WeightKey, tuple[str, ...]]:
    """Return the trainable weights that several machines hold, with these machines, lowest stage first.

    `subdags` are all stages of one pipeline, `holders` their machines by stage.
    """
    found: dict[WeightKey, list[str]] = {}
    for subdag in sorted(subdags, key=lambda each: each.index):
        for weight in subdag.weights:
            known = found.setdefault(weight.key, []) if weight.trainable else []
            if holders[subdag.index] not in known:
                known.append(holders[subdag.index])
    return {key: tuple(each) for key, each in found.items() if len(each) > 1}
