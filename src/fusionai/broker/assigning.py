"""From a plan to everybody's share and roster: pure, no effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType

from msgspec.structs import replace

from fusionai.broker.link_book import LinkBook
from fusionai.broker.records import MemberRecord
from fusionai.errors import PlacementError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.evaluation import faces
from fusionai.graph.model import SubDag, WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.contacts import Contact
from fusionai.pool.identifiers import JobEpoch
from fusionai.scheduling.plan import Plan
from fusionai.training.assignment_parcels import Assignment
from fusionai.training.roster import Roster, tied_holders
from fusionai.training.share import Share

_NOBODY: frozenset[PeerId] = frozenset()
_NO_PAIRS: Mapping[PeerId, Set[PeerId]] = MappingProxyType({})


def assignments(
    of: JobEpoch,
    plan: Plan,
    subdags: Sequence[SubDag],
    *,
    members: Mapping[PeerId, MemberRecord],
    owner: PeerId,
    driver: PeerId,
    links: LinkBook,
    options: ProgramOptions,
    handing: Mapping[PeerId, Set[PeerId]] = _NO_PAIRS,
) -> dict[PeerId, Assignment]:
    """Return the share and roster of every machine of a plan, the driver included even when it holds no stage.

    Args:
        of: names the plan on the wire.
        plan: who holds which stage.
        subdags: the stages.
        members: the records of all machines.
        owner: whose job it is.
        driver: who drives the job.
        links: says who dials whom.
        options: the job's; their device is the owner's.
        handing: the pairs that exchange weights before the plan is run, where it follows another one. Machines that
            only give weights get a share without stages.

    Raises:
        PlacementError: two machines must exchange tensors, but neither can dial the other.
    """
    holders = [PeerId(stage.peer) for stage in plan.stages]
    sums = tied_holders(subdags, holders)
    around = _neighbours(subdags, holders, sums, driver)
    found = {}
    for peer in dict.fromkeys([driver, *holders, *sorted(handing)]):
        record = members[peer]
        share = Share(
            job=of.job,
            subdags=tuple(subdag for subdag in subdags if holders[subdag.index] == peer),
            in_flight={stage.stage: stage.in_flight for stage in plan.stages_of(peer)},
            options=_local(options, record, is_owner=peer == owner),
            memory_bytes=sum(stage.predicted.memory_bytes for stage in plan.stages_of(peer)),
        )
        keys = share.weights().keys()
        near = around.get(peer, set())
        only_weights = handing.get(peer, _NOBODY) - near
        roster = Roster(
            job=of.job,
            epoch=of.epoch,
            owner=owner,
            driver=driver,
            pipelines=(tuple(holders),),
            sums={key: summing for key, summing in sums.items() if key in keys},
            neighbours=tuple(_contact(record, members[other], links) for other in sorted(near)),
            handing=tuple(_contact(record, members[other], links) for other in sorted(only_weights)),
        )
        found[peer] = Assignment(share, roster)
    return found


def _neighbours(
    subdags: Sequence[SubDag],
    peers: Sequence[PeerId],
    sums: Mapping[WeightKey, tuple[str, ...]],
    driver: PeerId,
) -> dict[PeerId, set[PeerId]]:
    """Return for every machine those that it exchanges tensors or words with."""
    around: dict[PeerId, set[PeerId]] = {peer: {driver} for peer in peers}
    around[driver] = set(peers)
    for subdag in subdags:
        for transfer in (each for part in faces(subdag) for each in part.sends):
            source, target = peers[transfer.source], peers[transfer.target]
            around[source].add(target)
            around[target].add(source)
    for holders in sums.values():
        for holder in holders:
            around[PeerId(holder)].update(PeerId(other) for other in holders)
    for peer, others in around.items():
        others.discard(peer)
    return around


def _contact(record: MemberRecord, other: MemberRecord, links: LinkBook) -> Contact:
    nobody_listens = not record.addresses and not other.addresses
    if nobody_listens or not links.reachable(record.peer, other.peer):
        raise PlacementError(
            f"{record.name} and {other.name} must exchange tensors, but neither can be dialled by the other: give "
            "one of them an address that the other can reach (--listen HOST:PORT, and behind a router --advertise "
            "HOST:PORT)"
        )
    return Contact(peer=other.peer, name=other.name, addresses=other.addresses, dial=links.dials(record, other))


def _local(options: ProgramOptions, record: MemberRecord, *, is_owner: bool) -> ProgramOptions:
    """Return the job's options for one machine: its own device."""
    if is_owner or record.device is None:
        return options
    return replace(options, device=record.device.device)
