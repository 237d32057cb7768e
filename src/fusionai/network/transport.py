"""The interface between endpoints and links on one side, and what carries their frames on the other.

A `Transport` reaches other nodes and is reached by them; a link between two nodes has two `Channel`s, one for control
and one for bulk. `tls_transport` carries frames over TLS connections, `memory` inside one process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fusionai.errors import NetworkError
from fusionai.network.framing import Admit, Frame, FrameType
from fusionai.network.greeting import Announcement
from fusionai.network.identity import PeerId
from fusionai.network.messages import Hello
from fusionai.network.shaping import LinkShaper

Buffer = bytes | bytearray | memoryview


class Channel(ABC):
    """Carries frames to and from one authenticated peer, reliably and in order. For the event loop's thread only."""

    peer: PeerId
    """The id of the peer."""
    remote_host: str
    """The address from which the other end is seen, without its port; "" when unknown."""
    heard_s: float
    """When bytes last arrived, by `clock.now_s`."""

    @property
    @abstractmethod
    def failure(self) -> NetworkError | None:
        """The error that ended the channel; None while it is usable."""

    @abstractmethod
    def start(
        self,
        body_limits: Mapping[FrameType, int],
        receive: Callable[[Frame], None],
        on_lost: Callable[[NetworkError], None],
        admit: Admit | None = None,
    ) -> None:
        """Continue reading. `receive` gets every further frame; `on_lost` gets the error when there are no more, once.

        Both are called from the event loop. If `receive` raises ProtocolError, the stream counts as corrupt. So do
        frames whose type is not in `body_limits`, or whose body is longer.
        """

    @abstractmethod
    def pause_reading(self) -> None:
        """Stop reading until `resume_reading`. The peer must wait then."""

    @abstractmethod
    def resume_reading(self) -> None:
        """Continue reading after `pause_reading`."""

    @abstractmethod
    def shape(self, shaper: LinkShaper, *, urgent: bool) -> None:
        """Send through an emulated wire from now on."""

    @abstractmethod
    def send(self, kind: FrameType, header: msgspec.Struct, payload: Buffer = b"") -> int:
        """Write a frame without waiting; return its bytes. A channel that is gone drops it."""

    @abstractmethod
    async def send_large(self, kind: FrameType, raw: bytes, body: memoryview) -> int:
        """Write a frame with an encoded header, and wait until it is sent. Return the frame's bytes."""

    @abstractmethod
    async def drain(self) -> None:
        """Wait until the channel takes more bytes. Raises the channel's error when it is gone."""

    @abstractmethod
    def abort(self, error: NetworkError) -> None:
        """Drop the channel at once, for this reason."""

    @abstractmethod
    async def finish(self, within_s: float) -> None:
        """Send the queued data, then close. Drop the channel if that takes longer than `within_s`."""


Admission = Callable[[PeerId, Hello], Awaitable[None]]
"""Raises a FusionError unless this peer may have a link by this greeting."""
Established = Callable[[Hello, Channel, Channel], None]
"""Takes the greeting, the control and the bulk channel of a new link."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """How an endpoint treats peers that dial it."""

    announcement: Callable[[], Announcement]
    admit: Admission
    established: Established
    ended: Callable[[PeerId, Hello], None]
    """Called once for each judged greeting, whether it led to a link or not."""


class Listening(ABC):
    """One address at which others can dial."""

    address: str
    """ "host:port"."""

    @abstractmethod
    async def close(self) -> None:
        """Stop listening, and drop connections that are no link yet."""


class Transport(ABC):
    """Lets one endpoint reach others and be reached."""

    @abstractmethod
    async def listen(self, host: str, port: int, arrivals: Arrivals) -> Listening:
        """Let others dial; port 0 stands for any free one. Raises ConfigError when the address cannot be used."""

    @abstractmethod
    async def dial(
        self, peer: PeerId, addresses: Sequence[str], *, announcement: Announcement, credential: bytes
    ) -> tuple[Hello, Channel, Channel]:
        """Return the peer's greeting, and a control and a bulk channel to it. The caller sets the deadline.

        Raises:
            AuthenticationError: another key answers at the address, or the peer does not admit this node.
            ProtocolError: what answers is no FusionAI node, or one of an incompatible version.
            DuplicateLink: the peer has, or is about to have, a link with this node by its own dialling.
            PeerLost: nobody answers at any address.
            FusionError: what the peer's `authorise` raised.
        """
