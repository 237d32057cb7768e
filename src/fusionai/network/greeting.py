"""The first messages of two endpoints: who they are, which versions they speak, and whether they may go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusionai.errors import FusionError, NetworkError, ProtocolError
from fusionai.network.identity import PeerId
from fusionai.network.limits import Limits
from fusionai.network.messages import (
    Greeting,
    Hello,
    LinkRefused,
    PeerVersion,
    decode,
    error_from,
    error_name,
    short_text,
)

_MAX_NAME = 200
_DUPLICATE = "Duplicate"


class DuplicateLink(NetworkError):
    """The peer has a link with this node already, or is dialling this node itself. Its link will appear."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What this endpoint tells every peer in its greeting."""

    release: PeerVersion
    instance: bytes
    name: str
    limits: Limits

    def hello(self, *, channel: Literal["control", "bulk"], session: bytes, credential: bytes = b"") -> Hello:
        """Return the greeting of one connection."""
        return Hello(
            release=self.release,
            channel=channel,
            session=session,
            instance=self.instance,
            name=self.name[:_MAX_NAME],
            window_bytes=self.limits.window_bytes,
            control_payload_bytes=self.limits.control_payload_bytes,
            bulk_body_bytes=self.limits.bulk_body_bytes,
            credential=credential,
        )


def check_release(header: bytes, mine: PeerVersion, peer: PeerId) -> None:
    """Check that a greeting's sender speaks a compatible protocol. Works on greetings of any version.

    Raises:
        ProtocolError: another major version of the protocol; the text names both.
    """
    theirs = decode(Greeting, header).release
    if theirs.major != mine.major:
        older = "this node" if theirs.major > mine.major else "the peer"
        raise ProtocolError(f"{peer[:12]} speaks {theirs}, this node {mine}; update {older}")


def check_greeting(hello: Hello) -> None:
    """Check the values of a greeting.

    Raises:
        ProtocolError: one is outside its bounds.
    """
    if len(hello.session) != 16 or len(hello.instance) != 8 or len(hello.name) > _MAX_NAME:
        raise ProtocolError("a greeting has a session of 16 bytes, an instance of 8 and a name of at most 200")
    if min(hello.window_bytes, hello.control_payload_bytes, hello.bulk_body_bytes) < 1:
        raise ProtocolError("a greeting's limits must be above 0")


def refuse(error: FusionError, mine: PeerVersion) -> LinkRefused:
    """Return the message that tells a dialler why it is refused."""
    name = _DUPLICATE if isinstance(error, DuplicateLink) else error_name(error)
    return LinkRefused(error=name, text=short_text(error)[:1000], release=mine)


def refusal(message: LinkRefused, peer: PeerId) -> FusionError:
    """Return the error that a refused dialler raises."""
    if message.error == _DUPLICATE:
        return DuplicateLink(message.text)
    return error_from(message.error, f"{peer[:12]} refused the connection: {message.text}")
