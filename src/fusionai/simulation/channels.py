"""Directed links as things that are occupied: one tensor after another, with uploads in the background.

A tensor of a pass starts when the link is free and occupies it for its bytes over the bandwidth. Where machines share
an uplink or a downlink among their links, it is through when all three have carried it, one tensor after another. An
upload in the background, such as a snapshot, is a second flow: the two get half of the link each while both have
something to send, and either has all of it while the other has nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusionai.scheduling.estimator import delay_s, send_s
from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.links import Links


class Backlog:
    """What background uploads still have to send over a link, or an uplink: seconds, alone on it."""

    __slots__ = ("as_of_s", "left_s")

    def __init__(self) -> None:
        self.left_s = 0.0
        self.as_of_s = 0.0

    def left_at(self, now_s: float) -> float:
        """Return the seconds left at a time from which on nothing else was sent."""
        return max(0.0, self.left_s - max(0.0, now_s - self.as_of_s))

    def settle(self, now_s: float) -> None:
        """Take off what was sent up to now, and count time from there (now is 0 of the next step)."""
        self.left_s, self.as_of_s = self.left_at(now_s), 0.0

    def stretched(self, start_s: float, seconds: float) -> float:
        """Return how long a tensor takes that would take `seconds` alone, and take off what goes beside it."""
        left_s = self.left_at(start_s)
        beside_s = min(left_s, seconds)
        self.left_s = left_s - beside_s
        self.as_of_s = max(self.as_of_s, start_s + seconds + beside_s)
        return seconds + beside_s


class Port:
    """A machine's uplink or downlink, shared by its links. Its rate may be infinite."""

    __slots__ = ("bytes_per_s", "free_s")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.free_s = 0.0


class Channel:
    """One direction of a link."""

    __slots__ = ("backlog", "busy_s", "delay_s", "down", "free_s", "profile", "sent_bytes", "source", "target", "up")

    def __init__(
        self, source: str, target: str, profile: LinkProfile, backlog: Backlog, up: Port | None, down: Port | None
    ) -> None:
        self.source, self.target, self.profile = source, target, profile
        self.delay_s = delay_s(profile)
        self.backlog = backlog
        self.up, self.down = up, down
        self.free_s = 0.0
        self.busy_s = 0.0
        self.sent_bytes = 0.0

    @property
    def ready_s(self) -> float:
        """Return when the link, and the uplink that it shares, can take another tensor."""
        return self.free_s if self.up is None else max(self.free_s, self.up.free_s)

    def send(self, now_s: float, seconds: float, size_bytes: float) -> float:
        """Send a tensor handed over at `now_s`; return when its last byte leaves. It arrives `delay_s` later."""
        start_s = self.free_s if self.free_s > now_s else now_s
        if self.backlog.left_s:
            seconds = self.backlog.stretched(start_s, seconds)
        self.free_s = start_s + seconds
        if self.up is not None and self.down is not None:
            self.up.free_s = max(start_s, self.up.free_s) + size_bytes / self.up.bytes_per_s
            # What finds the downlink taken waits in the network, and does not hold the sender up.
            self.down.free_s = max(start_s, self.down.free_s) + size_bytes / self.down.bytes_per_s
            self.free_s = max(self.free_s, self.up.free_s, self.down.free_s)
        self.busy_s += seconds
        self.sent_bytes += size_bytes
        return self.free_s


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went over one directed link."""

    sent_bytes: float
    busy_s: float


class Channels:
    """All links in use, made when they are first asked for."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self.shared = bool(links.up_bytes_per_s or links.down_bytes_per_s)
        self._channels: dict[tuple[str, str], Channel] = {}
        self._up: dict[str, Port] = {}
        self._down: dict[str, Port] = {}
        self._backlogs: dict[str, Backlog] = {}
        self._loaded: dict[int, Backlog] = {}

    def between(self, source: str, target: str) -> Channel:
        """Return the link from one machine to another."""
        if (found := self._channels.get((source, target))) is None:
            up = down = None
            backlog = Backlog()
            if self.shared:
                up = self._up.setdefault(source, Port(self._links.up_bytes_per_s.get(source, math.inf)))
                down = self._down.setdefault(target, Port(self._links.down_bytes_per_s.get(target, math.inf)))
                backlog = self._backlogs.setdefault(source, backlog)
            profile = self._links.link(source, target)
            found = self._channels[source, target] = Channel(source, target, profile, backlog, up, down)
        return found

    def profile(self, source: str, target: str) -> LinkProfile:
        """Return a link's figures; within a machine nothing takes time."""
        return LinkProfile(0.0, math.inf) if source == target else self.between(source, target).profile

    def upload(self, source: str, target: str, size_bytes: float) -> None:
        """Begin a background upload at the start of a step."""
        channel = self.between(source, target)
        channel.backlog.left_s += send_s(size_bytes, channel.profile)
        channel.sent_bytes += size_bytes
        self._loaded[id(channel.backlog)] = channel.backlog

    def bulk(self, source: str, target: str, size_bytes: float) -> float:
        """Send something large outside the pipelines' steps; return the seconds until it has arrived."""
        if source == target:
            return 0.0
        channel = self.between(source, target)
        channel.sent_bytes += size_bytes
        seconds = send_s(size_bytes, channel.profile)
        channel.busy_s += seconds
        return seconds + channel.delay_s

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

    def end_step(self, length_s: float) -> None:
        """Free all links and begin a new step at time 0; uploads go on."""
        for channel in self._channels.values():
            channel.free_s = 0.0
        for port in (*self._up.values(), *self._down.values()):
            port.free_s = 0.0
        for key, backlog in list(self._loaded.items()):
            backlog.settle(length_s)
            if not backlog.left_s:
                del self._loaded[key]

    def take_traffic(self) -> dict[tuple[str, str], Traffic]:
        """Return what went over each link since the last call, links without any left out."""
        found = {}
        for key, channel in self._channels.items():
            if channel.sent_bytes or channel.busy_s:
                found[key] = Traffic(channel.sent_bytes, channel.busy_s)
                channel.sent_bytes = channel.busy_s = 0.0
        return found
