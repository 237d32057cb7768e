"""Messages of jobs over an endpoint: encoded, checked, and routed to the receiver of their job and epoch.

Each kind of work brings a table of what its machines say to each other (`MessageKinds`); the wire knows no more of it.
A machine may be driver and stage of one job at once, so messages to itself are delivered directly, through the
same handlers and in the same order as they would be over a link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from fusionai.errors import JobError, NetworkError, PeerLost, ProtocolError
from fusionai.network.endpoint import Endpoint, Link
from fusionai.network.identity import PeerId
from fusionai.pool.codec import kind_of
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId
from fusionai.pool.member_part import MemberPart
from fusionai.tensor import DType, TensorData, tensor_bytes

_encode = msgspec.msgpack.Encoder().encode

_Decoders = dict[str, msgspec.msgpack.Decoder[Any]]


class JobMessage(Protocol):
    """What every message of a job has: a msgspec struct whose tag is its kind on the wire."""

    @property
    def job(self) -> JobId:
        """The job that it is of."""

    @property
    def epoch(self) -> Epoch:
        """The plan that it is of; a message of an epoch that is over is dropped."""


class TensorHeader(JobMessage, Protocol):
    """What every message that carries a tensor has."""

    @property
    def dtype(self) -> DType:
        """Type of the tensor's elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""


@dataclass(frozen=True)
class MessageKinds:
    """What the machines of one kind of work say to each other."""

    prefix: str
    """The kinds of all its messages begin with this, such as "train."."""
    control: tuple[type[msgspec.Struct], ...]
    """Small messages, sent as requests or notices. Each is a `JobMessage`."""
    bulk: tuple[type[msgspec.Struct], ...]
    """Headers of tensors, sent as bulk. Each is a `TensorHeader`."""

    def __post_init__(self) -> None:
        for message in (*self.control, *self.bulk):
            if not kind_of(message).startswith(self.prefix):
                raise ValueError(f"the kind {kind_of(message)!r} does not begin with {self.prefix!r}")


_Control = TypeVar("_Control", contravariant=True)
_Header = TypeVar("_Header", contravariant=True)


class Receiver(Protocol[_Control, _Header]):
    """One side of a job on this machine, such as its stages, or its driver."""

    def takes(self, message: object) -> bool:
        """Whether a message is for this side; what comes of other kinds of work is not."""

    async def on_control(self, peer: PeerId, message: _Control) -> bytes:
        """Handle a notice (the result is dropped) or answer a request."""

    async def on_tensor(self, peer: PeerId, header: _Header, tensor: TensorData) -> None:
        """Handle a tensor; the sender's credit returns when this does."""

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """A link is gone."""


class JobWire(MemberPart):
    """The part of a member that sends and receives the messages of all its jobs, routed by job and epoch."""

    def __init__(self, endpoint: Endpoint, kinds: Sequence[MessageKinds]) -> None:
        """`kinds` are the tables of the kinds of work that this machine takes part in."""
        self.endpoint = endpoint
        self.me = endpoint.peer_id
        self.peer_prefixes = tuple(each.prefix for each in kinds)
        self._control: _Decoders = {
            kind_of(message): msgspec.msgpack.Decoder(message) for each in kinds for message in each.control
        }
        self._bulk: _Decoders = {
            kind_of(message): msgspec.msgpack.Decoder(message) for each in kinds for message in each.bulk
        }
        self._receivers: dict[JobEpoch, list[Receiver[Any, Any]]] = {}
        self._sealed: set[JobEpoch] = set()

    def attach(self, plan: JobEpoch, receiver: Receiver[Any, Any]) -> None:
        """Route the messages of a job's epoch to a receiver too. Raises JobError when that epoch is sealed."""
        if plan in self._sealed:
            raise JobError(f"this machine has its part in job {plan} already, and takes no other one")
        self._receivers.setdefault(plan, []).append(receiver)

    def detach(self, plan: JobEpoch, receiver: Receiver[Any, Any]) -> None:
        """Stop routing to a receiver. Messages of an epoch without receivers are dropped, and requests refused."""
        remaining = [other for other in self._receivers.get(plan, []) if other is not receiver]
        if remaining:
            self._receivers[plan] = remaining
        else:
            self._receivers.pop(plan, None)
            self._sealed.discard(plan)

    def seal(self, plan: JobEpoch) -> None:
        """Let nobody else attach to a job's epoch until all who are attached to it have been detached.

        An owner seals a plan whose share here it has checked: from then on the broker cannot put another in its place.
        """
        if plan in self._receivers:
            self._sealed.add(plan)

    def linked(self, peer: PeerId) -> bool:
        """Whether there is a link with a peer; this machine is always linked with itself."""
        return peer == self.me or self.endpoint.link(peer) is not None

    # --- sending ------------------------------------------------------------------------------------------

    async def notify(self, peer: PeerId, message: JobMessage) -> None:
        """Send a control message that wants no answer. Raises PeerLost when there is no link."""
        if peer == self.me:
            await self._receiver(message).on_control(peer, message)
        else:
            await self._link(peer).notify(_kind(message), _encode(message))

    async def request(self, peer: PeerId, message: JobMessage, *, timeout_s: float) -> bytes:
        """Send a control message and return its answer."""
        if peer == self.me:
            return await self._receiver(message).on_control(peer, message)
        return await self._link(peer).request(_kind(message), _encode(message), timeout_s=timeout_s)

    async def send(self, peer: PeerId, header: TensorHeader, tensor: TensorData) -> None:
        """Send a tensor; returns when the peer's credit allowed it out."""
        if peer == self.me:
            await self._receiver(header).on_tensor(peer, header, tensor)
        else:
            await self._link(peer).send_bulk(_kind(header), _encode(header), tensor.data)

    def _link(self, peer: PeerId) -> Link:
        link = self.endpoint.link(peer)
        if link is None:
            raise PeerLost(f"there is no link to {peer[:12]}")
        return link

    # --- receiving: MemberPart ----------------------------------------------------------------------------

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Answer a request of a job."""
        message: JobMessage = _decoded(self._control, kind, payload)
        return await self._receiver(message).on_control(link.peer, message)

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Take a notice of a job; one of an epoch that is not here, or not any more, is dropped."""
        message: JobMessage = _decoded(self._control, kind, payload)
        if _plan(message) in self._receivers:
            await self._receiver(message).on_control(link.peer, message)

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Take a tensor of a job; one of an epoch that is not here, or not any more, is dropped."""
        message: TensorHeader = _decoded(self._bulk, kind, header)
        if _plan(message) not in self._receivers:
            return
        if any(size < 0 for size in message.shape) or tensor_bytes(message.dtype, message.shape) != len(body):
            raise ProtocolError(f"a {message.dtype} tensor of shape {list(message.shape)} came with {len(body)} bytes")
        tensor = TensorData(message.dtype, message.shape, body)
        await self._receiver(message).on_tensor(link.peer, message, tensor)

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """Tell every receiver that a link is gone."""
        for receiver in [each for receivers in self._receivers.values() for each in receivers]:
            await receiver.on_peer_closed(peer, error)

    def _receiver(self, message: JobMessage) -> Receiver[Any, Any]:
        for receiver in self._receivers.get(_plan(message), []):
            if receiver.takes(message):
                return receiver
        raise ProtocolError(
            f"{_kind(message)} for epoch {message.epoch} of job {message.job!r}, which this machine has no part in"
        )


def _plan(message: JobMessage) -> JobEpoch:
    return JobEpoch(message.job, message.epoch)


def _kind(message: JobMessage) -> str:
    return kind_of(message)  # type: ignore[arg-type]  # every message is a struct; a protocol cannot say so


def _decoded(decoders: _Decoders, kind: str, payload: bytes) -> Any:
    decoder = decoders.get(kind)
    if decoder is None:
        raise ProtocolError(f"message kind {kind!r} is unknown; known: {', '.join(decoders)}")
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed {kind}: {error}") from error
