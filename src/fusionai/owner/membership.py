"""The owner's membership of a pool, for as long as a job takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from fusionai.compnode.member import Member
from fusionai.execution.planes import plane
from fusionai.network.identity import Identity
from fusionai.network.lab import LabConfig
from fusionai.network.token import JoinToken
from fusionai.pool.device_measurement import measure


@dataclass(frozen=True, kw_only=True)
class OwnerOptions:
    """How the owner's machine takes part."""

    token: str
    """Join token of the pool."""
    name: str = "owner"
    device: str | None = None
    """For the stages that stay here; None: the best there is."""
    threads: int = 1
    listen: str = "127.0.0.1:0"
    """Where compnodes may dial this machine."""
    advertise: tuple[str, ...] = ()
    lab: LabConfig | None = None
    slowdown: float = 1.0


@asynccontextmanager
async def joined(options: OwnerOptions) -> AsyncIterator[Member]:
    """Be a member of the pool; leaves it in the end.

    Raises TokenError, AuthenticationError, PeerLost or PeerTimeout when the pool does not admit this machine.
    """
    JoinToken.decode(options.token)  # a wrong token is told before anything slow
    torch_plane = await asyncio.to_thread(plane, "torch")
    cache = Path(platformdirs.user_data_dir("fusionai", appauthor=False)) / "owner"
    profile = await asyncio.to_thread(
        measure,
        torch_plane,
        device=options.device,
        threads=options.threads,
        slowdown=options.slowdown,
        cache_folder=cache,
    )
    member = Member(
        Identity.ephemeral(),
        options.token,
        role="owner",
        name=options.name,
        profile=profile,
        plane=torch_plane,
        listen=options.listen,
        advertise=options.advertise,
        lab=options.lab,
        slowdown=options.slowdown,
    )
    await member.start()
    try:
        yield member
    finally:
        await member.close()
