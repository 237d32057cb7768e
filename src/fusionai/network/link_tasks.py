"""The tasks of one link: a task that fails ends its link, and the end of the link cancels all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fusionai.errors import FusionError, NetworkError, ProtocolError
from fusionai.network.messages import short_text

log = logging.getLogger(__name__)

_CANCEL_S = 5.0
"""How long a task may take to heed its cancellation before it is left behind, with a word in the log."""


class LinkTasks:
    """Handlers of a link's messages, and what the link does in the background."""

    def __init__(self, who: str, closed: Callable[[], bool], end: Callable[[NetworkError, str | None], None]) -> None:
        """Hold none yet.

        Args:
            who: the peer, for people.
            closed: whether the link has ended; failures after that are nobody's concern.
            end: ends the link with an error, and with what the peer is told (None: nothing more than its class tells).
        """
        self._who, self._closed, self._end = who, closed, end
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether a task is one of these."""
        return task in self._tasks

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    async def cancel_all(self) -> None:
        """Cancel all tasks, and wait for their end."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=_CANCEL_S)
            if stuck:
                log.error("%d tasks of the link to %s ignore their cancellation", len(stuck), self._who)

    def _reap(self, task: asyncio.Task[None]) -> None:
        """Forget an ended task; one that failed ends the link."""
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None or self._closed():
            return
        if isinstance(error, NetworkError):
            self._end(error, None if isinstance(error, ProtocolError) else short_text(error))
            return
        if not isinstance(error, FusionError):
            log.error("a handler of the link to %s failed", self._who, exc_info=error)
        text = f"handling a message of {self._who} failed: {type(error).__name__}: {error}"
        self._end(NetworkError(text), f"its handler failed with {type(error).__name__}")
