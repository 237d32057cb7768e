"""What endpoints and links need of whatever carries their frames: one small interface, several ways to do it.

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
    """An ordered, reliable way to one proven peer that carries frames. For the event loop's thread only."""

    peer: PeerId
    """Who is at the other end."""
    remote_host: str
    """The address from which the other end is seen, without its port; "" when unknown."""
    heard_s: float
    """When bytes last arrived, by `clock.now_s`."""

    @property
    @abstractmethod
    def failure(self) -> NetworkError | None:
        """Why the channel is of no further use; None while it is."""

    @abstractmethod
    def start(
        self,
        body_limits: Mapping[FrameType, int],
        receive: Callable[[Frame], None],
        on_lost: Callable[[NetworkError], None],
        admit: Admit | None = None,
    ) -> None:
        """Read on: `receive` gets every further frame, `on_lost` the reason when there will be no more, once.

        Both are called from the event loop; `receive` may raise ProtocolError, which counts as a corrupt stream.
        Frames of a type not in `body_limits`, or with a longer body, are refused as corrupt too.
        """

    @abstractmethod
    def pause_reading(self) -> None:
        """Stop reading until `resume_reading`; the peer is held back then."""

    @abstractmethod
    def resume_reading(self) -> None:
        """Read again."""

    @abstractmethod
    def shape(self, shaper: LinkShaper, *, urgent: bool) -> None:
        """Send through an emulated wire from now on."""

    @abstractmethod
    def send(self, kind: FrameType, header: msgspec.Struct, payload: Buffer = b"") -> int:
        """Write a frame without waiting; return its bytes. A channel that is gone drops it."""

    @abstractmethod
    async def send_large(self, kind: FrameType, raw: bytes, body: memoryview) -> int:
        """Write a frame with an encoded header, and wait until it is out; return its bytes."""

    @abstractmethod
    async def drain(self) -> None:
        """Wait until the channel takes more. Raises the reason when it is gone."""

    @abstractmethod
    def abort(self, error: NetworkError) -> None:
        """Drop the channel at once, for this reason."""

    @abstractmethod
    async def finish(self, within_s: float) -> None:
        """Send what is still queued, then close; drop it when that takes longer than `within_s`."""


Admission = Callable[[PeerId, Hello], Awaitable[None]]
"""Raises a FusionError unless this peer may have a link by this greeting."""
Established = Callable[[Hello, Channel, Channel], None]
"""Takes the greeting, the control and the bulk channel of a new link."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """How an endpoint treats those who dial it."""

    announcement: Callable[[], Announcement]
    admit: Admission
    established: Established
    ended: Callable[[PeerId, Hello], None]
    """Called once for each greeting that was judged, whether a link came of it or not."""


class Listening(ABC):
    """One address at which others can dial."""

    address: str
    """ "host:port"."""

    @abstractmethod
    async def close(self) -> None:
        """Stop listening, and drop what is not a link yet."""


class Transport(ABC):
    """How one endpoint reaches others and is reached."""

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
