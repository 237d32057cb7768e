"""From a plan to everybody's assignment: pure, no effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType

from msgspec.structs import replace

from fusionai.broker.links import LinkBook
from fusionai.broker.records import MemberRecord
from fusionai.errors import PlacementError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.model import SubDag, WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import JobEpoch
from fusionai.scheduling.plan import Plan
from fusionai.training.messages import Assignment, Neighbour

_NOBODY: frozenset[PeerId] = frozenset()
_NO_PAIRS: Mapping[PeerId, Set[PeerId]] = MappingProxyType({})


def assignments(
    of: JobEpoch,
    plan: Plan,
    subdags: Sequence[SubDag],
    members: Mapping[PeerId, MemberRecord],
    owner: PeerId,
    links: LinkBook,
    options: ProgramOptions,
    handing: Mapping[PeerId, Set[PeerId]] = _NO_PAIRS,
) -> dict[PeerId, Assignment]:
    """Return the assignment of every machine of a plan, the owner included even when it holds no stage.

    `of` names the plan on the wire. `members` are the records of all machines; `options` are the job's, whose device is
    the owner's. `handing` tells the pairs that exchange weights before the plan is run, where it follows another one;
    machines that only give weights get an assignment without stages.

    Raises:
        PlacementError: two machines must exchange tensors, but neither can dial the other.
    """
    stage_peers = [PeerId(stage.peer) for stage in plan.stages]
    tied = _tied(subdags, stage_peers)
    around = _neighbours(subdags, stage_peers, tied, owner)
    found = {}
    for peer in dict.fromkeys([owner, *stage_peers, *sorted(handing)]):
        record = members[peer]
        own = tuple(subdag for subdag in subdags if stage_peers[subdag.index] == peer)
        keys = {weight.key for subdag in own for weight in subdag.weights}
        found[peer] = Assignment(
            job=of.job,
            epoch=of.epoch,
            owner=owner,
            subdags=own,
            in_flight={stage.stage: stage.in_flight for stage in plan.stages_of(peer)},
            stage_peers=tuple(stage_peers),
            tied={key: holders for key, holders in tied.items() if key in keys},
            options=_local(options, record, is_owner=peer == owner),
            neighbours=tuple(_neighbour(record, members[other], links) for other in sorted(around.get(peer, set()))),
            memory_bytes=sum(stage.predicted.memory_bytes for stage in plan.stages_of(peer)),
            handing=tuple(
                _neighbour(record, members[other], links)
                for other in sorted(handing.get(peer, _NOBODY) - around.get(peer, set()))
            ),
        )
    return found


def _tied(subdags: Sequence[SubDag], peers: Sequence[PeerId]) -> dict[WeightKey, tuple[str, ...]]:
    """Return the trainable weights that several machines hold, with these machines, lowest stage first."""
    holders: dict[WeightKey, list[str]] = {}
    for subdag in sorted(subdags, key=lambda each: each.index):
        for weight in subdag.weights:
            known = holders.setdefault(weight.key, []) if weight.trainable else []
            if peers[subdag.index] not in known:
                known.append(peers[subdag.index])
    return {key: tuple(each) for key, each in holders.items() if len(each) > 1}


def _neighbours(
    subdags: Sequence[SubDag],
    peers: Sequence[PeerId],
    tied: Mapping[WeightKey, tuple[str, ...]],
    owner: PeerId,
) -> dict[PeerId, set[PeerId]]:
    """Return for every machine those that it exchanges tensors or words with."""
    around: dict[PeerId, set[PeerId]] = {peer: {owner} for peer in peers}
    around[owner] = set(peers)
    for subdag in subdags:
        for transfer in subdag.sends:
            source, target = peers[transfer.source], peers[transfer.target]
            around[source].add(target)
            around[target].add(source)
    for holders in tied.values():
        for holder in holders:
            around[PeerId(holder)].update(PeerId(other) for other in holders)
    for peer, others in around.items():
        others.discard(peer)
    return around


def _neighbour(record: MemberRecord, other: MemberRecord, links: LinkBook) -> Neighbour:
    nobody_listens = not record.addresses and not other.addresses
    if nobody_listens or not links.reachable(record.peer, other.peer):
        raise PlacementError(
            f"{record.name} and {other.name} must exchange tensors, but neither can be dialled by the other: give "
            "one of them an address that the other can reach (--listen HOST:PORT, and behind a router --advertise "
            "HOST:PORT)"
        )
    return Neighbour(peer=other.peer, name=other.name, addresses=other.addresses, dial=links.dials(record, other))


def _local(options: ProgramOptions, record: MemberRecord, *, is_owner: bool) -> ProgramOptions:
    """Return the job's options for one machine: its own device."""
    if is_owner or record.device is None:
        return options
    return replace(options, device=record.device.device)
