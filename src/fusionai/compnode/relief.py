"""Leaving in order: what this machine holds goes to others first, while the job trains on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from fusionai.errors import FusionError
from fusionai.pool.messages import HeldShare, NoReplacement, WishToLeave

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0
"""A broker that does not answer by then is not waited for."""

ASK_AGAIN_S = 30.0
"""The owner may have been without a link to the broker, and not have heard."""


class Relief:
    """Waits until this machine holds nothing, or nobody will take it.

    `holds` tells what is held now. The caller reports changes: `changed` when a job came or
    went, `refused` when the broker says that nobody takes this machine's part, `cut_off` when the broker is lost.
    """

    def __init__(self, holds: Callable[[], Sequence[HeldShare]]) -> None:
        self._holds = holds
        self._news = asyncio.Event()
        self._over = ""

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
