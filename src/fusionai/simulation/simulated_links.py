"""Links in a simulation: each direction carries one tensor after another, and uploads in the background.

A tensor of a pass starts when the link is free and occupies it for its bytes over the bandwidth. Where machines share
an uplink or a downlink among their links, it is through when all three have carried it, one tensor after another. An
upload in the background, such as a snapshot, is a second flow: the two get half of the link each while both have
something to send, and either has all of it while the other has nothing.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from fusionai.scheduling.estimator import delay_s, send_s
from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.link_rates import LinkRates


@dataclass(slots=True)
class Upload:
    """What is left of one background upload."""

    channel: SimulatedLink
    size_bytes: float
    seconds: float


class Backlog:
    """What background uploads still have to send over a link, or an uplink: seconds, alone on it."""

    __slots__ = ("as_of_s", "left_s", "uploads")

    def __init__(self) -> None:
        self.left_s = 0.0
        self.as_of_s = 0.0
        self.uploads: deque[Upload] = deque()
        """In the order in which they are sent; what of them is through is taken off by `settle` alone."""

    def left_at(self, now_s: float) -> float:
        """Return the seconds left at a time from which on nothing else was sent."""
        return max(0.0, self.left_s - max(0.0, now_s - self.as_of_s))

    def settle(self, now_s: float) -> None:
        """Take off and count what was sent up to now, and count time from there (now is 0 of the next step)."""
        self.left_s, self.as_of_s = self.left_at(now_s), 0.0
        through_s = sum(upload.seconds for upload in self.uploads) - self.left_s
        while self.uploads and (through_s > 0 or not self.left_s):
            upload = self.uploads[0]
            whole = not self.left_s or upload.seconds <= through_s
            share = 1.0 if whole else through_s / upload.seconds
            upload.channel.sent_bytes += share * upload.size_bytes
            through_s -= upload.seconds
            if not whole:
                upload.size_bytes *= 1 - share
                upload.seconds = -through_s
                return
            self.uploads.popleft()

    def drop(self, now_s: float) -> None:
        """Count what was sent up to now, and forget the rest: the sender is gone."""
        self.settle(now_s)
        self.left_s = 0.0
        self.uploads.clear()

    def stretched(self, start_s: float, seconds: float) -> float:
        """Return how long a tensor takes that would take `seconds` alone, and take off what goes beside it."""
        left_s = self.left_at(start_s)
        beside_s = min(left_s, seconds)
        self.left_s = left_s - beside_s
        self.as_of_s = max(self.as_of_s, start_s + seconds + beside_s)
        return seconds + beside_s

    def take_back(self, beside_s: float, end_s: float, now_s: float) -> None:
        """Let what was to go beside a tensor until `end_s` be still to send, because the tensor was cut off."""
        self.left_s += beside_s
        if self.as_of_s == end_s:
            self.as_of_s = now_s


class Port:
    """A machine's uplink or downlink, shared by its links. Its rate may be infinite."""

    __slots__ = ("bytes_per_s", "free_s")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.free_s = 0.0

    def take(self, start_s: float, size_bytes: float, beside_s: float = 0.0) -> Span:
        """Carry something handed over at `start_s` when what came before is through; return when."""
        start_s = max(start_s, self.free_s)
        self.free_s = start_s + size_bytes / self.bytes_per_s + beside_s
        return Span(start_s, self.free_s)

    def give_back(self, span: Span, now_s: float) -> None:
        """Be free from now on, where what was cut off is the last that it would have carried."""
        if self.free_s == span.end_s > now_s:
            self.free_s = max(now_s, span.start_s)


class Span(NamedTuple):
    """Seconds of the step in which something occupies a link, an uplink or a downlink."""

    start_s: float
    end_s: float

    def share(self, now_s: float) -> float:
        """Return the share that is over at a time."""
        if now_s >= self.end_s:
            return 1.0
        return (now_s - self.start_s) / (self.end_s - self.start_s) if now_s > self.start_s else 0.0


class Flow(NamedTuple):
    """Something on its way, as long as it may still be cut off."""

    size_bytes: float
    link: Span
    beside_s: float
    """Seconds of `link` that background uploads have."""
    up: Span | None
    down: Span | None
    stays: bool
    """Its sender's death does not end it."""

    @property
    def end_s(self) -> float:
        """Return when the link, the uplink and the downlink have all carried it."""
        return max(span.end_s for span in (self.link, self.up, self.down) if span is not None)

    def through(self, now_s: float) -> float:
        """Return the share that the link, the uplink and the downlink have all carried at a time."""
        return min(span.share(now_s) for span in (self.link, self.up, self.down) if span is not None)


class SimulatedLink:
    """One direction of a link."""

    __slots__ = (
        "backlog",
        "busy_s",
        "delay_s",
        "down",
        "flows",
        "free_s",
        "profile",
        "sent_bytes",
        "source",
        "target",
        "up",
    )

    def __init__(
        self,
        source: str,
        target: str,
        profile: LinkProfile,
        backlog: Backlog,
        up: Port | None,
        down: Port | None,
        *,
        may_be_cut: bool,
    ) -> None:
        self.source, self.target, self.profile = source, target, profile
        self.delay_s = delay_s(profile)
        self.backlog = backlog
        self.up, self.down = up, down
        self.free_s = 0.0
        self.busy_s = 0.0
        self.sent_bytes = 0.0
        self.flows: list[Flow] | None = [] if may_be_cut else None
        """What was sent since the step began."""

    @property
    def ready_s(self) -> float:
        """Return when the link, and the uplink that it shares, can take another tensor."""
        return self.free_s if self.up is None else max(self.free_s, self.up.free_s)

    def send(self, now_s: float, seconds: float, size_bytes: float, *, stays: bool = False) -> float:
        """Send a tensor handed over at `now_s`; return when its last byte leaves. It arrives `delay_s` later.

        `stays`: the sender's death does not cut it off.
        """
        start_s = self.free_s if self.free_s > now_s else now_s
        beside_s = 0.0
        if self.backlog.left_s:
            stretched_s = self.backlog.stretched(start_s, seconds)
            beside_s, seconds = stretched_s - seconds, stretched_s
        self.free_s = start_s + seconds
        up = down = None
        if self.up is not None and self.down is not None:
            # The uploads beside it take their time of the uplink, too.
            up = self.up.take(start_s, size_bytes, beside_s)
            # What finds the downlink taken waits in the network, and does not hold the sender up.
            down = self.down.take(start_s, size_bytes)
            self.free_s = max(self.free_s, up.end_s, down.end_s)
        self.busy_s += seconds
        self.sent_bytes += size_bytes
        if self.flows is not None:
            self.flows.append(Flow(size_bytes, Span(start_s, start_s + seconds), beside_s, up, down, stays))
        return self.free_s

    def cut(self, at_s: float, *, sender_died: bool = False) -> None:
        """Take a death at one of its ends, or the step's end: what is not through will not come, and is not counted."""
        kept: list[Flow] = []
        for flow in self.flows or ():
            through = flow.through(at_s)
            if through >= 1 or (flow.stays and sender_died):
                kept.append(flow)
                continue
            self.sent_bytes -= (1 - through) * flow.size_bytes
            length_s = flow.link.end_s - flow.link.start_s
            unspent_s = (1 - flow.link.share(at_s)) * length_s
            self.busy_s -= unspent_s
            if flow.beside_s:
                self.backlog.take_back(flow.beside_s * unspent_s / length_s, flow.link.end_s, at_s)
            for port, span in ((self.up, flow.up), (self.down, flow.down)):
                if port is not None and span is not None:
                    port.give_back(span, at_s)
        if self.flows is not None:
            self.flows = kept
            self.free_s = min(self.free_s, max([at_s, *(flow.end_s for flow in kept)]))


@dataclass(frozen=True, slots=True)
class LinkUse:
    """Bytes and seconds that one direction of a link was used."""

    sent_bytes: float
    busy_s: float


class SimulatedLinks:
    """All links in use. Each is made when it is first asked for."""

    def __init__(self, links: LinkRates, *, may_be_cut: bool = False) -> None:
        """`may_be_cut`: remember what is on its way, for `lose` and `end_step` to take off what does not arrive."""
        self._links = links
        self._may_be_cut = may_be_cut
        self.shared = bool(links.up_bytes_per_s or links.down_bytes_per_s)
        self._channels: dict[tuple[str, str], SimulatedLink] = {}
        self._up: dict[str, Port] = {}
        self._down: dict[str, Port] = {}
        self._backlogs: dict[str, Backlog] = {}
        self._loaded: dict[int, Backlog] = {}

    def between(self, source: str, target: str) -> SimulatedLink:
        """Return the link from one machine to another."""
        if (found := self._channels.get((source, target))) is None:
            up = down = None
            backlog = Backlog()
            if self.shared:
                up = self._up.setdefault(source, Port(self._links.up_bytes_per_s.get(source, math.inf)))
                down = self._down.setdefault(target, Port(self._links.down_bytes_per_s.get(target, math.inf)))
                backlog = self._backlogs.setdefault(source, backlog)
            profile = self._links.link(source, target)
            found = self._channels[source, target] = SimulatedLink(
                source, target, profile, backlog, up, down, may_be_cut=self._may_be_cut
            )
        return found

    def profile(self, source: str, target: str) -> LinkProfile:
        """Return a link's figures; within a machine nothing takes time."""
        return LinkProfile(0.0, math.inf) if source == target else self.between(source, target).profile

    def upload(self, source: str, target: str, size_bytes: float) -> None:
        """Begin a background upload at the start of a step."""
        channel = self.between(source, target)
        seconds = send_s(size_bytes, channel.profile)
        for port in (channel.up, channel.down):
            if port is not None:
                seconds = max(seconds, size_bytes / port.bytes_per_s)
        channel.backlog.left_s += seconds
        channel.backlog.uploads.append(Upload(channel, size_bytes, seconds))
        self._loaded[id(channel.backlog)] = channel.backlog

    def send_state(self, source: str, target: str, size_bytes: float, now_s: float) -> float:
        """Send something large whose sender is taken to stay until it is through; return when it has arrived."""
        if source == target:
            return now_s
        channel = self.between(source, target)
        left_s = channel.send(now_s, send_s(size_bytes, channel.profile), size_bytes, stays=True)
        return left_s + channel.delay_s

    def count(self, source: str, target: str, size_bytes: float) -> None:
        """Count bytes, and the time that they occupy a link, whose end is reckoned elsewhere."""
        channel = self.between(source, target)
        channel.sent_bytes += size_bytes
        channel.busy_s += send_s(size_bytes, channel.profile)

    def uploaded(self, source: str, target: str, now_s: float) -> bool:
        """Return whether every upload from one machine to another is through at a time of this step."""
        return self.between(source, target).backlog.left_at(now_s) <= 0

    @property
    def uploading(self) -> bool:
        """Return whether anything is left to upload, as of the step's start."""
        return bool(self._loaded)

    def lose(self, machine: str, now_s: float) -> None:
        """Take a machine's death: what is on its way to it or from it is cut off, and so are its uploads."""
        for channel in self._channels.values():
            if machine in (channel.source, channel.target):
                channel.cut(now_s, sender_died=machine == channel.source)
        for channel in self._channels.values():
            if machine == channel.source and channel.backlog.uploads:
                channel.backlog.drop(now_s)

    def end_step(self, length_s: float) -> dict[tuple[str, str], LinkUse]:
        """Free all links and begin a new step at time 0; uploads go on. Return what went over each link meanwhile."""
        for channel in self._channels.values():
            if channel.free_s > length_s:
                channel.cut(length_s)
            if channel.flows:
                channel.flows.clear()
            channel.free_s = 0.0
        for port in (*self._up.values(), *self._down.values()):
            port.free_s = 0.0
        for key, backlog in list(self._loaded.items()):
            backlog.settle(length_s)
            if not backlog.left_s:
                del self._loaded[key]
        return self.take_traffic()

    def take_traffic(self) -> dict[tuple[str, str], LinkUse]:
        """Return what went over each link since the last call, links without any left out."""
        found = {}
        for key, channel in self._channels.items():
            if channel.sent_bytes or channel.busy_s:
                found[key] = LinkUse(channel.sent_bytes, channel.busy_s)
                channel.sent_bytes = channel.busy_s = 0.0
        return found
