"""The headers of frames between two endpoints, as MessagePack maps and arrays.

The greeting travels as a map, because every version must be able to read it. Everything after it travels as arrays. A
minor version may add fields with defaults at the end of either. A decoder skips fields that it does not know.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeVar

import msgspec

import fusionai.errors
from fusionai.errors import FusionError, NetworkError, ProtocolError

PROTOCOL_MAJOR = 2
PROTOCOL_MINOR = 0


@cache
def _package_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fusionai")
    except PackageNotFoundError:
        return "unknown"


class PeerVersion(msgspec.Struct, frozen=True, kw_only=True):
    """The versions that a node speaks. Nodes with equal major numbers work together; everything else may differ."""

    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR
    package: str = msgspec.field(default_factory=_package_version)
    features: tuple[str, ...] = ()
    """Optional features of the protocol. A link uses a feature when both sides name it."""

    def __str__(self) -> str:
        return f"protocol {self.major}.{self.minor} (fusionai {self.package})"


class Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """The part of HELLO and WELCOME that every version, past and future, can read."""

    release: PeerVersion


class Hello(Greeting, frozen=True, kw_only=True):
    """HELLO, first frame of the dialler, and WELCOME, the listener's assent."""

    channel: Literal["control", "bulk"]
    session: bytes
    """16 random bytes of the dialler. Both connections of one link carry the same ones."""
    instance: bytes
    """8 random bytes of the process. They tell a peer that restarted from a peer that dials twice."""
    name: str = ""
    window_bytes: int
    """Bulk bytes that the sender of this is ready to hold."""
    control_payload_bytes: int
    bulk_body_bytes: int
    """The longest payloads that the sender of this accepts."""
    credential: bytes = b""
    """Bytes that the listener's `authorise` judges, such as a join token; empty on the bulk channel."""


class LinkRefused(msgspec.Struct, frozen=True, kw_only=True):
    """REFUSE: the listener refuses the dialler and closes. BYE carries the same header."""

    error: str
    """Class of the error, or "Duplicate": a link with this peer is there or on its way already."""
    text: str
    release: PeerVersion | None = None


class Call(msgspec.Struct, frozen=True, array_like=True):
    """REQUEST: a message that the peer answers."""

    number: int
    kind: str


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """ANSWER and CANCEL: the number of the request."""

    number: int


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """FAILURE: the peer's handler raised an error for the request of this number."""

    number: int
    error: str
    text: str


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """NOTICE: a message without an answer."""

    kind: str


class Bulk(msgspec.Struct, frozen=True, array_like=True):
    """BULK: the kind and the upper layer's own header."""

    kind: str
    header: bytes


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """CREDIT: bytes of the window that the receiver's handler has finished with."""

    count_bytes: int


class Ping(msgspec.Struct, frozen=True, array_like=True):
    """PING and PONG."""

    number: int


MAX_KIND = 100
_MAX_TEXT = 4000
_Header = TypeVar("_Header", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Greeting, Hello, LinkRefused, Call, Reply, Failure, Notice, Bulk, Credit, Ping)
}
_ERRORS: dict[str, type[FusionError]] = {
    name: value
    for name, value in vars(fusionai.errors).items()
    if isinstance(value, type) and issubclass(value, FusionError)
}
"""The only classes that a peer can make this side raise."""


def encode(header: msgspec.Struct) -> bytes:
    """Return a header's bytes."""
    return _encoder.encode(header)


def decode(kind: type[_Header], raw: bytes) -> _Header:
    """Return the header that `raw` holds.

    Raises:
        ProtocolError: it holds none of that kind.
    """
    try:
        header: _Header = _decoders[kind].decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed {kind.__name__} header: {error}") from error
    if isinstance(header, Call | Notice | Bulk) and not 0 < len(header.kind) <= MAX_KIND:
        raise ProtocolError(f"a kind has 1 to {MAX_KIND} characters, got {len(header.kind)}")
    return header


def error_name(error: FusionError) -> str:
    """Return the name under which an error travels: its class, or the nearest base that peers know."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)


def short_text(error: BaseException) -> str:
    """Return the text of an error, cut to what may travel."""
    return str(error)[:_MAX_TEXT]


def error_from(name: str, text: str) -> FusionError:
    """Return the error that a peer described; a class not in `fusionai.errors` becomes NetworkError."""
    # People will see the text, so control characters for terminals are removed.
    shown = "".join(each if each.isprintable() or each == "\n" else " " for each in text[:_MAX_TEXT])
    return _ERRORS.get(name, NetworkError)(shown)
