"""The provider's agent: measures this machine, joins a pool, and works for it until told to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.compnode.disk import measure_disk
from fusionai.compnode.disk_report import DiskReport
from fusionai.errors import ConfigError
from fusionai.execution.plane import Plane
from fusionai.network.identity import Identity, PeerId
from fusionai.network.lab import LabConfig
from fusionai.network.token import JoinToken
from fusionai.pool.device_measurement import measure
from fusionai.pool.member import MemberConfig
from fusionai.pool.messages import HeldShare
from fusionai.scheduling.profile import DeviceProfile, DiskProfile
from fusionai.training.slowdown import Slowdown, Throttle
from fusionai.training.training_work import TrainingWork

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

IDENTITY = "identity.pem"

MOST_DRAIN_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What a provider decides."""

    token: str
    name: str
    state_folder: Path
    device: str | None = None
    """None: the best there is."""
    threads: int | None = None
    """None: all cores."""
    memory_bytes: int | None = None
    """None: a safe share of what is free."""
    listen: str = "127.0.0.1:0"
    advertise: tuple[str, ...] = ()
    remeasure: bool = False
    slowdown: float = 1.0
    throttle: Throttle | None = None
    lab: LabConfig | None = None
    drain_s: float = 300.0
    """How long other machines may take to take over this one's shares when it is stopped; 0 leaves at once."""

    def __post_init__(self) -> None:
        if not 0 <= self.drain_s <= MOST_DRAIN_S:
            raise ConfigError(f"drain must be between 0 and 86400 seconds (a day), got {self.drain_s}")


@dataclass(frozen=True)
class Joined:
    """What a compnode is in its pool, once it has joined."""

    name: str
    """As the broker gave it."""
    peer: PeerId
    address: str | None
    """Where it listens."""
    device: DeviceProfile
    disk: DiskProfile
    lab: bool
    """Whether its speed or its links are emulated."""


class Agent:
    """A compnode's process, without its command line."""

    def __init__(self, config: AgentConfig, load_plane: Callable[[], Plane]) -> None:
        """`load_plane` blocks for seconds (torch is large); it is called in a thread.

        Raises:
            TokenError: the token is malformed, forged or expired.
        """
        self._config = config
        self._load_plane = load_plane
        self._token = JoinToken.decode(config.token)

    async def run(
        self,
        stop: asyncio.Event,
        on_joined: Callable[[Joined], None],
        on_draining: Callable[[Sequence[HeldShare]], bool] = lambda held: True,
    ) -> None:
        """Join, call `on_joined`, and serve until `stop` is set; then leave cleanly.

        A machine with a part in a job waits until others have taken it over, no longer than `drain_s`, and leaves all
        the same if nobody can. `on_draining` is called before that, with what is held, and
        returns whether to wait at all.

        Raises:
            TokenError, AuthenticationError: the pool does not admit this machine, now or later.
            PeerLost, PeerTimeout: the broker is not there. Once joined, it is waited for instead.
            ConfigError, StorageError: an option cannot be met.
        """
        config = self._config
        identity = await asyncio.to_thread(Identity.load_or_create, config.state_folder / IDENTITY)
        plane = await _unless(stop, asyncio.to_thread(self._load_plane))
        if plane is None:
            return
        profile = await asyncio.to_thread(
            measure,
            plane,
            device=config.device,
            threads=config.threads,
            memory_bytes=config.memory_bytes,
            slowdown=config.slowdown,
            cache_folder=config.state_folder,
            remeasure=config.remeasure,
        )
        disk = await asyncio.to_thread(measure_disk, config.state_folder, remeasure=config.remeasure)
        if stop.is_set():
            return
        slowdown = Slowdown(config.slowdown, config.throttle)
        member = CompnodeMember(
            identity,
            self._token,
            MemberConfig(
                name=config.name,
                listen=config.listen,
                advertise=config.advertise,
                lab=config.lab,
                emulates_speed=slowdown.emulated,
            ),
            profile=profile,
            work=[TrainingWork(plane, slowdown)],
            disk=DiskReport(disk, config.state_folder),
        )
        await member.start()
        try:
            on_joined(Joined(member.name, identity.peer_id, member.address, profile, disk, member.lab))
            await _unless(stop, member.wait_ended())
            if member.holds and config.drain_s and on_draining(member.holds):
                held_still = await member.relieve("its provider stopped it", config.drain_s)
                if held_still:
                    log.warning("left with a part in a job: %s", held_still)
        finally:
            await member.close("its provider stopped it" if stop.is_set() else "it ended")


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """Return what `work` returns, or None as soon as `stop` is set."""
    stopped = asyncio.ensure_future(stop.wait())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((stopped, working), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        stopped.cancel()
        working.cancel()
        await asyncio.gather(stopped, working, return_exceptions=True)
