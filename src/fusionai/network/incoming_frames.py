"""The frames that arrive on a link, each handed to the part of the link that it concerns."""

from __future__ import annotations

from collections.abc import Callable

from fusionai.errors import NetworkError, PeerLost
from fusionai.network.bulk_receiver import BulkReceiver
from fusionai.network.credit import SendCredit
from fusionai.network.framing import Frame, FrameType
from fusionai.network.inbox import Inbox
from fusionai.network.liveness import Liveness
from fusionai.network.messages import Bulk, Call, Credit, Failure, LinkRefused, Notice, Ping, Reply, decode, error_from
from fusionai.network.probing import BURST, RESERVED, ProbeResponder
from fusionai.network.requests import Answering, Asking
from fusionai.network.statistics import LinkStatistics
from fusionai.network.transport import Channel


class IncomingFrames:
    """Takes the frames of one link's two connections, until the link ends."""

    def __init__(
        self,
        *,
        control: Channel,
        asking: Asking,
        answering: Answering,
        inbox: Inbox,
        credit: SendCredit,
        arrivals: BulkReceiver,
        liveness: Liveness,
        prober: ProbeResponder,
        statistics: LinkStatistics,
        who: str,
        closed: Callable[[], bool],
        end: Callable[[NetworkError], None],
    ) -> None:
        """Take the parts of a link.

        Args:
            control: the connection on which pings are answered.
            asking: gets answers to this side's requests.
            answering: gets the peer's probes, and its cancelling of requests in work.
            inbox: gets the peer's requests and notices, which wait there for the handler.
            credit: this side's to send bulk, which the peer returns.
            arrivals: gets bulk messages.
            liveness: gets the answers to pings.
            prober: gets the bursts of probes.
            statistics: counts everything.
            who: the peer, for people.
            closed: whether the link has ended; what arrives after that is dropped.
            end: ends the link, because the peer says so.
        """
        self._control = control
        self._asking, self._answering = asking, answering
        self._inbox, self._credit, self._arrivals = inbox, credit, arrivals
        self._liveness, self._prober, self._statistics = liveness, prober, statistics
        self._who, self._closed, self._end = who, closed, end

    def on_control(self, frame: Frame) -> None:
        """Take a frame of the control connection."""
        if self._closed():
            return
        match frame.type:
            case FrameType.REQUEST | FrameType.NOTICE:
                message: Call | Notice = (
                    decode(Call, frame.header) if frame.type is FrameType.REQUEST else decode(Notice, frame.header)
                )
                self._count(message.kind, frame)
                if isinstance(message, Call) and message.kind.startswith(RESERVED):
                    self._answering.begin(message, bytes(frame.body))
                else:
                    self._inbox.put(message, bytes(frame.body))
            case FrameType.ANSWER:
                number = decode(Reply, frame.header).number
                self._count(self._asking.kind(number), frame)
                self._asking.answered(number, bytes(frame.body))
            case FrameType.FAILURE:
                failure = decode(Failure, frame.header)
                self._count(self._asking.kind(failure.number), frame)
                self._asking.failed(failure)
            case FrameType.CANCEL:
                number = decode(Reply, frame.header).number
                if not self._answering.cancel(number):
                    self._inbox.drop_call(number)
            case FrameType.CREDIT:
                self._count("link.credit", frame)
                self._credit.give(decode(Credit, frame.header).count_bytes)
            case FrameType.PING:
                self._count("link.ping", frame)
                ping = decode(Ping, frame.header)
                self._control.send(FrameType.PONG, ping)
            case FrameType.PONG:
                self._count("link.ping", frame)
                self._liveness.on_pong(decode(Ping, frame.header).number)
            case FrameType.BYE:
                bye = decode(LinkRefused, frame.header)
                error = error_from(bye.error, f"{self._who} ended the link: {bye.text}")
                self._end(error if isinstance(error, NetworkError) else PeerLost(str(error)))

    def admit_bulk(self, kind: FrameType, header: bytes, body_bytes: int) -> None:
        """Check that the peer has credit for a bulk frame whose body is still to come."""
        self._arrivals.admit(len(header), body_bytes)

    def on_bulk(self, frame: Frame) -> None:
        """Take a frame of the bulk connection."""
        if self._closed():
            return
        message = decode(Bulk, frame.header)
        self._count(message.kind, frame)
        if message.kind == BURST:
            self._arrivals.finish(len(frame.header) + len(frame.body))
            self._prober.on_burst(len(frame.body))
            return
        self._arrivals.put(message, frame)

    def _count(self, kind: str, frame: Frame) -> None:
        self._statistics.count_received(kind, len(frame.body), frame.wire_bytes)
