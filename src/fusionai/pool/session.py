"""A member's connection with its broker: made, registered, and made again whenever it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from fusionai.errors import AuthenticationError, FusionError, NetworkError, PeerLost, PeerTimeout, UserError
from fusionai.network.endpoint import Endpoint
from fusionai.network.link import Link
from fusionai.network.token import JoinToken
from fusionai.pool.background_tasks import BackgroundTasks
from fusionai.pool.codec import decode, encode, kind_of
from fusionai.pool.messages import Heartbeat, LeavePool, MemberRegistered, RegisterMember

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 15.0
REGISTER_TIMEOUT_S = 15.0
LEAVE_TIMEOUT_S = 3.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
"""Pauses between attempts double from the first to the longest, each shortened at random by up to half, so that a
pool does not come back to its restarted broker all at once."""


class BrokerSession:
    """Keeps one member registered with its broker."""

    def __init__(
        self,
        endpoint: Endpoint,
        token: JoinToken,
        *,
        register: Callable[[], RegisterMember],
        on_registered: Callable[[MemberRegistered], None],
    ) -> None:
        """`register` makes the registration anew each time; `on_registered` takes the broker's answer."""
        self._endpoint = endpoint
        self._token = token
        self._register = register
        self._on_registered = on_registered
        self._heartbeat_s = 2.0
        self._link: Link | None = None
        self._broken = asyncio.Event()
        self._beat = asyncio.Event()
        self._tasks = BackgroundTasks()
        self._closing = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the error after which no further attempt is made: the broker has another key, or no longer admits this
        member."""

    async def open(self, *, heartbeat: Callable[[], Heartbeat] | None) -> None:
        """Connect and register for the first time, and from then on keep it so.

        `heartbeat` makes the notice to send now and then; None sends none.

        Raises:
            TokenError, AuthenticationError: the broker does not admit this member, or is another one.
            PeerLost, PeerTimeout: the broker is not there.
        """
        await self._enter()
        self._tasks.start(self._keep(), "broker session")
        if heartbeat is not None:
            self._tasks.start(self._beat_on(heartbeat), "heartbeat")

    def link(self) -> Link:
        """Return the link to the broker. Raises PeerLost while it is broken."""
        if self._link is None or self._link.closed:
            raise PeerLost("there is no connection with the broker at the moment; it is being tried again")
        return self._link

    def broken(self, link: Link, error: NetworkError) -> None:
        """A link is gone; called for every link of the endpoint."""
        if link is not self._link:
            return
        self._link = None
        if not self._closing:
            log.warning("the connection with the broker is lost (%s); trying again", error)
            self._broken.set()

    def beat_now(self) -> None:
        """Send a heartbeat without waiting for its time."""
        self._beat.set()

    async def close(self, reason: str) -> None:
        """Leave the pool; a broker that is not there is not waited for."""
        self._closing = True
        await self._tasks.close()
        if not self.ended.done():
            self.ended.cancel()
        if self._link is not None and not self._link.closed:
            try:
                await self._link.request(kind_of(LeavePool), encode(LeavePool(reason)), timeout_s=LEAVE_TIMEOUT_S)
            except FusionError as error:
                log.info("the broker did not take leave: %s", error)

    # --- inside ---------------------------------------------------------------------------------------------

    async def _enter(self) -> None:
        link = await self._endpoint.connect(
            self._token.broker,
            self._token.addresses,
            credential=self._token.encode().encode("ascii"),
            timeout_s=CONNECT_TIMEOUT_S,
        )
        self._link = link
        answer = await link.request(kind_of(RegisterMember), encode(self._register()), timeout_s=REGISTER_TIMEOUT_S)
        registered = decode(MemberRegistered, answer)
        self._heartbeat_s = min(max(registered.heartbeat_s, 0.1), 60.0)
        self._on_registered(registered)
        self._beat.set()
        if link.closed:
            self._broken.set()

    async def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            await self._broken.wait()
            self._broken.clear()
            while True:
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                try:
                    await self._enter()
                except (UserError, AuthenticationError) as error:
                    log.error("the broker does not take this machine back: %s", error)
                    if not self.ended.done():
                        self.ended.set_exception(error)
                        self.ended.exception()  # it may be that nobody asks
                    return
                except FusionError as error:
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    level = logging.WARNING if pause_s == LONGEST_PAUSE_S else logging.INFO
                    log.log(level, "the broker is not back: %s", error)
                else:
                    log.info("registered with the broker again")
                    pause_s = FIRST_PAUSE_S
                    break

    async def _beat_on(self, make: Callable[[], Heartbeat]) -> None:
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._beat.wait()
            except TimeoutError:
                pass
            self._beat.clear()
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self.link().notify(kind_of(Heartbeat), encode(make()))
            except (PeerLost, PeerTimeout, TimeoutError):
                continue
