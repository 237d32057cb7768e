"""Messages of `fusionai.pool.messages` as bytes. The kind on the wire is the struct's tag."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec

from fusionai.errors import ProtocolError

PREFIX = "broker."
"""Kinds that begin so are the broker's and its members'."""

GRAPH = "broker.graph"
"""Bulk to the broker: an encoded OP-DAG; the header is its content hash."""

ASSIGNMENT = "broker.assignment"
"""Bulk to a member: a packed `Assignment`; the header is its job and epoch, written as `JobEpoch` does."""

_Message = TypeVar("_Message", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


def kind_of(message: msgspec.Struct | type[msgspec.Struct]) -> str:
    """Return the kind under which a message travels."""
    return str(message.__struct_config__.tag)


def encode(message: msgspec.Struct) -> bytes:
    """Return a message's bytes."""
    return _encoder.encode(message)


def decode(kind: type[_Message], payload: bytes) -> _Message:
    """Return the message that `payload` holds.

    Raises:
        ProtocolError: it holds none of that kind.
    """
    try:
        message: _Message = _decoder(kind).decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed {kind_of(kind)}: {error}") from error
    return message


@cache
def _decoder(kind: type[msgspec.Struct]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)
