"""Large things that travel as bulk ahead of the request that names them: encoded OP-DAGs and assignments."""

from __future__ import annotations

import asyncio

import msgspec

from fusionai.errors import PeerTimeout, ProtocolError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.encoding import decode_subdag, encode_subdag
from fusionai.graph.model import WeightKey
from fusionai.network.identity import PeerId
from fusionai.training.messages import Assignment, JobId, Neighbour

MOST_BYTES = 256 << 20
"""Largest parcel: an OP-DAG of 15,000 operators takes about 10 MB."""


class ParcelInbox:
    """Parcels that came and are not asked for yet: one per sender, a few in all."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._parcels: dict[PeerId, tuple[str, bytes]] = {}
        self._arrived = asyncio.Condition()

    async def put(self, sender: PeerId, name: str, body: bytes) -> None:
        """Keep a parcel; it replaces the sender's last one, and the oldest of all when there are too many.

        Raises:
            ProtocolError: it is too large.
        """
        if len(body) > MOST_BYTES:
            raise ProtocolError(f"a parcel of {len(body):,} bytes came; at most {MOST_BYTES:,} are allowed")
        async with self._arrived:
            self._parcels.pop(sender, None)
            while len(self._parcels) >= self._most:
                del self._parcels[next(iter(self._parcels))]
            self._parcels[sender] = (name, body)
            self._arrived.notify_all()

    async def take(self, sender: PeerId, name: str, *, timeout_s: float) -> bytes:
        """Wait for a sender's parcel of that name, and take it out.

        Raises:
            PeerTimeout: it did not come in time.
        """
        try:
            async with asyncio.timeout(timeout_s), self._arrived:
                await self._arrived.wait_for(lambda: self._parcels.get(sender, ("", b""))[0] == name)
                return self._parcels.pop(sender)[1]
        except TimeoutError:
            raise PeerTimeout(f"{name[:16]} did not arrive from {sender[:12]} within {timeout_s:g} s") from None

    def drop(self, sender: PeerId) -> None:
        """Forget what a sender left."""
        self._parcels.pop(sender, None)


class _Packed(msgspec.Struct, frozen=True):
    """An `Assignment` whose sub-DAGs are in their canonical encoding, so that they are verified like every OP-DAG."""

    job: JobId
    owner: str
    subdags: tuple[bytes, ...]
    in_flight: dict[int, int]
    stage_peers: tuple[str, ...]
    tied: dict[WeightKey, tuple[str, ...]]
    options: ProgramOptions
    neighbours: tuple[Neighbour, ...]
    memory_bytes: int
    handing: tuple[Neighbour, ...] = ()


_decoder = msgspec.msgpack.Decoder(_Packed)


def pack(assignment: Assignment) -> bytes:
    """Return an assignment's bytes. Slow for large sub-DAGs: call it in a thread."""
    return msgspec.msgpack.encode(
        _Packed(
            assignment.job,
            assignment.owner,
            tuple(encode_subdag(each) for each in assignment.subdags),
            assignment.in_flight,
            assignment.stage_peers,
            assignment.tied,
            assignment.options,
            assignment.neighbours,
            assignment.memory_bytes,
            assignment.handing,
        )
    )


def unpack(data: bytes) -> Assignment:
    """Return the assignment that `data` holds, its sub-DAGs verified. Slow: call it in a thread.

    Raises:
        ProtocolError: malformed.
        GraphError: a sub-DAG breaks a rule.
    """
    try:
        packed = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed assignment: {error}") from error
    assignment = Assignment(
        packed.job,
        packed.owner,
        tuple(decode_subdag(each) for each in packed.subdags),
        packed.in_flight,
        packed.stage_peers,
        packed.tied,
        packed.options,
        packed.neighbours,
        packed.memory_bytes,
        packed.handing,
    )
    _check(assignment)
    return assignment


def _check(assignment: Assignment) -> None:
    stages = len(assignment.stage_peers)
    for subdag in assignment.subdags:
        if not 0 <= subdag.index < stages or assignment.in_flight.get(subdag.index, 0) < 1:
            raise ProtocolError(f"the assignment's stage {subdag.index} has no place in its job of {stages} stages")
        for transfer in (*subdag.receives, *subdag.sends):
            if not (0 <= transfer.source < stages and 0 <= transfer.target < stages):
                raise ProtocolError(f"the assignment moves {transfer.value!r} to or from a stage that does not exist")
