"""Messages of jobs over an endpoint: encoded, checked, and routed to the receiver of their job and epoch.

A machine may be driver and stage of one job at once, so messages to itself are delivered directly, through the
same handlers and in the same order as they would be over a link.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, get_args

import msgspec

from fusionai.errors import NetworkError, PeerLost, ProtocolError
from fusionai.network.endpoint import Endpoint, Link
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import JobEpoch
from fusionai.tensor import TensorData, tensor_bytes
from fusionai.training.messages import Bulk, Control

_Message = TypeVar("_Message")

PREFIX = "train."
"""Kinds that begin so belong to jobs."""

_Decoder = msgspec.msgpack.Decoder
_encode = msgspec.msgpack.Encoder().encode


class Receiver(Protocol):
    """One side of a job on this machine: its stages, or its driver."""

    def takes(self, message: Control | Bulk) -> bool:
        """Whether a message is for this side."""

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        """Handle a notice (the result is dropped) or answer a request."""

    async def on_tensor(self, peer: PeerId, header: Bulk, tensor: TensorData) -> None:
        """Handle a tensor; the sender's credit returns when this does."""

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """A link is gone."""


def _kind(message: Control | Bulk | type[Control] | type[Bulk]) -> str:
    return str(message.__struct_config__.tag)


_CONTROL: dict[str, _Decoder[Control]] = {_kind(each): _Decoder(each) for each in get_args(Control)}
_BULK: dict[str, _Decoder[Bulk]] = {_kind(each): _Decoder(each) for each in get_args(Bulk)}


class JobWire:
    """Sends and receives the messages of all jobs of this machine, routed by job and epoch."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.me = endpoint.peer_id
        self._receivers: dict[JobEpoch, list[Receiver]] = {}

    def attach(self, plan: JobEpoch, receiver: Receiver) -> None:
        """Route the messages of a job's epoch to a receiver too."""
        self._receivers.setdefault(plan, []).append(receiver)

    def detach(self, plan: JobEpoch, receiver: Receiver) -> None:
        """Stop routing to a receiver. Messages of an epoch without receivers are dropped, and requests refused."""
        remaining = [other for other in self._receivers.get(plan, []) if other is not receiver]
        if remaining:
            self._receivers[plan] = remaining
        else:
            self._receivers.pop(plan, None)

    # --- sending ------------------------------------------------------------------------------------------

    async def notify(self, peer: PeerId, message: Control) -> None:
        """Send a control message that wants no answer. Raises PeerLost when there is no link."""
        if peer == self.me:
            await self._receiver(message).on_control(peer, message)
        else:
            await self._link(peer).notify(_kind(message), _encode(message))

    async def request(self, peer: PeerId, message: Control, *, timeout_s: float) -> bytes:
        """Send a control message and return its answer."""
        if peer == self.me:
            return await self._receiver(message).on_control(peer, message)
        return await self._link(peer).request(_kind(message), _encode(message), timeout_s=timeout_s)

    async def send(self, peer: PeerId, header: Bulk, tensor: TensorData) -> None:
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

    # --- receiving: called by the handler of the endpoint --------------------------------------------------

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Answer a request of a job."""
        message = _decoded(_CONTROL, kind, payload)
        return await self._receiver(message).on_control(link.peer, message)

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Take a notice of a job; one of an epoch that is not here, or not any more, is dropped."""
        message = _decoded(_CONTROL, kind, payload)
        if _plan(message) in self._receivers:
            await self._receiver(message).on_control(link.peer, message)

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Take a tensor of a job; one of an epoch that is not here, or not any more, is dropped."""
        message = _decoded(_BULK, kind, header)
        if _plan(message) not in self._receivers:
            return
        if any(size < 0 for size in message.shape) or tensor_bytes(message.dtype, message.shape) != len(body):
            raise ProtocolError(f"a {message.dtype} tensor of shape {list(message.shape)} came with {len(body)} bytes")
        tensor = TensorData(message.dtype, message.shape, body)
        await self._receiver(message).on_tensor(link.peer, message, tensor)

    async def on_close(self, peer: PeerId, error: NetworkError) -> None:
        """Tell every receiver that a link is gone."""
        for receiver in [each for receivers in self._receivers.values() for each in receivers]:
            await receiver.on_peer_closed(peer, error)

    def _receiver(self, message: Control | Bulk) -> Receiver:
        for receiver in self._receivers.get(_plan(message), []):
            if receiver.takes(message):
                return receiver
        raise ProtocolError(
            f"{_kind(message)} for epoch {message.epoch} of job {message.job!r}, which this machine has no part in"
        )


def _plan(message: Control | Bulk) -> JobEpoch:
    return JobEpoch(message.job, message.epoch)


def _decoded(decoders: dict[str, _Decoder[_Message]], kind: str, payload: bytes) -> _Message:
    decoder = decoders.get(kind)
    if decoder is None:
        raise ProtocolError(f"message kind {kind!r} is unknown; known: {', '.join(decoders)}")
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed {kind}: {error}") from error
