"""An assignment as the bytes of a parcel, and back, its sub-DAGs verified."""

from __future__ import annotations

import msgspec

from fusionai.errors import ProtocolError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.encoding import decode_subdag, encode_subdag
from fusionai.graph.model import WeightKey
from fusionai.pool.identifiers import Epoch, JobId
from fusionai.training.messages import Assignment, Neighbour


class _Packed(msgspec.Struct, frozen=True):
    """An `Assignment` whose sub-DAGs are in their canonical encoding, so that they are verified like every OP-DAG."""

    job: JobId
    epoch: Epoch
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
            assignment.epoch,
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
        packed.epoch,
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
