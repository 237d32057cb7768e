"""Leaving in order: before this machine leaves, other machines take over its shares, while the job goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from fusionai.errors import FusionError, NetworkError
from fusionai.network.endpoint import Link
from fusionai.network.identity import PeerId
from fusionai.pool.codec import decode, kind_of
from fusionai.pool.member_part import MemberPart
from fusionai.pool.messages import HeldShare, NoReplacement, WishToLeave

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0
"""How long to wait for the broker's answer."""

ASK_AGAIN_S = 30.0
"""How often the wish to leave is repeated: the owner may have had no link to the broker when it was first passed on."""


class Relief(MemberPart):
    """The part of a member that waits until this machine holds nothing, or nobody will take it."""

    broker_kinds = frozenset({kind_of(NoReplacement)})

    def __init__(self, holds: Callable[[], Sequence[HeldShare]]) -> None:
        """`holds` tells what is held now; `changed` is to be called when that changes."""
        self._holds = holds
        self._news = asyncio.Event()
        self._over = ""

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Hear that nobody takes what is held."""
        self.refused(decode(NoReplacement, payload))

    def on_broker_closed(self, broker: PeerId, error: NetworkError) -> None:
        """Nobody arranges anything any more."""
        self.cut_off(str(error))

    def changed(self) -> None:
        """What is held has changed."""
        self._news.set()

    def refused(self, message: NoReplacement) -> None:
        """Nobody takes what is held."""
        self._end(message.reason[:1000])

    def cut_off(self, why: str) -> None:
        """The broker is lost: nobody arranges anything any more."""
        self._end(f"the broker is lost: {why}")

    def _end(self, why: str) -> None:
        self._over = self._over or why
        self._news.set()

    async def wait(self, ask: Callable[[WishToLeave], Awaitable[None]], reason: str, within_s: float) -> str:
        """Ask to be relieved, and wait for it no longer than `within_s`.

        `ask` sends the broker the request. Returns why something is held still, "" if nothing is.
        """
        if not self._holds() or within_s <= 0:
            return ""
        self._over = ""
        try:
            async with asyncio.timeout(within_s):
                await ask(WishToLeave(reason))
                while self._holds() and not self._over:
                    self._news.clear()
                    try:
                        async with asyncio.timeout(ASK_AGAIN_S):
                            await self._news.wait()
                    except TimeoutError:
                        await ask(WishToLeave(reason))
        except TimeoutError:
            return f"nobody took it within {within_s:g} s"
        except FusionError as error:
            return str(error)
        return self._over if self._holds() else ""
