"""A share and its roster as the bytes of a parcel, and back, the sub-DAGs verified."""

from __future__ import annotations

import msgspec

from fusionai.errors import ProtocolError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.encoding import decode_subdag, encode_subdag
from fusionai.graph.evaluation import faces
from fusionai.pool.contacts import Contact
from fusionai.pool.identifiers import JobEpoch
from fusionai.training.roster import Roster
from fusionai.training.share import Share


class Assignment(msgspec.Struct, frozen=True):
    """What the broker gives a machine: its share of a job, and the roster that it begins with."""

    share: Share
    roster: Roster

    @property
    def plan(self) -> JobEpoch:
        """The job and epoch that the share is made for."""
        return self.roster.plan

    @property
    def memory_bytes(self) -> int:
        """What the plan reckons with on this machine."""
        return self.share.memory_bytes

    @property
    def driver(self) -> str:
        """The peer that drives the job."""
        return self.roster.driver

    @property
    def contacts(self) -> tuple[Contact, ...]:
        """All machines to hold links with."""
        return self.roster.contacts


class _Packed(msgspec.Struct, frozen=True):
    """An `Assignment` whose sub-DAGs are in their canonical encoding, so that they are verified like every OP-DAG."""

    subdags: tuple[bytes, ...]
    in_flight: dict[int, int]
    options: ProgramOptions
    memory_bytes: int
    roster: Roster


_decoder = msgspec.msgpack.Decoder(_Packed)


def pack(assignment: Assignment) -> bytes:
    """Return an assignment's bytes. Slow for large sub-DAGs: call it in a thread."""
    share = assignment.share
    return msgspec.msgpack.encode(
        _Packed(
            tuple(encode_subdag(each) for each in share.subdags),
            share.in_flight,
            share.options,
            share.memory_bytes,
            assignment.roster,
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
    subdags = tuple(decode_subdag(each) for each in packed.subdags)
    share = Share(packed.roster.job, subdags, packed.in_flight, packed.options, packed.memory_bytes)
    assignment = Assignment(share, packed.roster)
    _check(assignment)
    return assignment


def _check(assignment: Assignment) -> None:
    share, pipelines = assignment.share, assignment.roster.pipelines
    # The runtime runs one pipeline.
    stages = len(pipelines[0]) if pipelines else 0
    for subdag in share.subdags:
        if not 0 <= subdag.index < stages or share.in_flight.get(subdag.index, 0) < 1:
            raise ProtocolError(f"the assignment's stage {subdag.index} has no place in its job of {stages} stages")
        for transfer in (each for part in faces(subdag) for each in (*part.receives, *part.sends)):
            if not (0 <= transfer.source < stages and 0 <= transfer.target < stages):
                raise ProtocolError(f"the assignment moves {transfer.value!r} to or from a stage that does not exist")
    if any(not holders for holders in assignment.roster.sums.values()):
        raise ProtocolError("the assignment names a tied weight that nobody holds")
