"""Requests on a link: this side's requests that wait for answers, and the peer's requests that are worked on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fusionai.errors import FusionError, NetworkError, ProtocolError
from fusionai.network.framing import FrameType
from fusionai.network.limits import Limits
from fusionai.network.messages import Call, Failure, Reply, error_from, error_name, short_text
from fusionai.network.statistics import LinkStatistics
from fusionai.network.transport import Channel

log = logging.getLogger(__name__)

_LATE = "link.late"
"""Kind under which statistics count answers that nobody waits for any longer."""


class Asking:
    """This side's open requests. A request is open until its answer, its failure or the end of the link."""

    def __init__(self) -> None:
        self._numbers = 0
        self._waiting: dict[int, tuple[str, asyncio.Future[bytes]]] = {}

    def open(self, kind: str) -> tuple[int, asyncio.Future[bytes]]:
        """Open a request: return its number, and a future for its answer. The caller must close it again."""
        self._numbers += 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[self._numbers] = (kind, answer)
        return self._numbers, answer

    def close(self, number: int) -> None:
        """Close a request. An answer that comes later is ignored."""
        _, answer = self._waiting.pop(number)
        if answer.done() and not answer.cancelled():
            answer.exception()  # the caller may be gone; asyncio shall not complain that nobody read the exception

    def kind(self, number: int) -> str:
        """Return the kind of a request, under which its answer is counted."""
        return self._waiting[number][0] if number in self._waiting else _LATE

    def answered(self, number: int, body: bytes) -> None:
        """Take an answer; a late one is ignored."""
        _, answer = self._waiting.get(number, (_LATE, None))
        if answer is not None and not answer.done():
            answer.set_result(body)

    def failed(self, failure: Failure) -> None:
        """Take the peer's failure; a late one is ignored."""
        _, answer = self._waiting.get(failure.number, (_LATE, None))
        if answer is not None and not answer.done():
            answer.set_exception(error_from(failure.error, failure.text))

    def fail(self, error: NetworkError) -> None:
        """Raise the link's error in everybody who waits."""
        for _, answer in self._waiting.values():
            if not answer.done():
                # Each waiter gets an exception of its own: a shared one would mix their tracebacks.
                answer.set_exception(type(error)(str(error)))


class Answering:
    """The peer's requests that are worked on, one task for each. The task sends the answer or the failure back.

    Args:
        control: the channel for answers and failures.
        limits: most requests and bytes that are worked on; further requests are refused.
        answer_bytes: the longest answer that the peer takes.
        work: answers a request by kind and payload. If it raises a FusionError, the peer's `request` raises it too.
        spawn: starts a task that ends with the link.
        closed: whether the link has ended; then nothing is sent any more.
        who: the peer's name for people.
    """

    def __init__(
        self,
        *,
        control: Channel,
        limits: Limits,
        answer_bytes: int,
        work: Callable[[str, bytes], Awaitable[bytes]],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        closed: Callable[[], bool],
        statistics: LinkStatistics,
        who: str,
    ) -> None:
        self._control = control
        self._limits = limits
        self._answer_bytes = answer_bytes
        self._work = work
        self._spawn = spawn
        self._closed = closed
        self._statistics = statistics
        self._who = who
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._bytes = 0

    def begin(self, call: Call, payload: bytes) -> None:
        """Start to work on a request, or refuse it. Raises ProtocolError for a repeated number or too many requests."""
        if call.number in self._tasks:
            raise ProtocolError(f"request number {call.number} is used twice")
        full = self._bytes + len(payload) > self._limits.queued_bytes
        if len(self._tasks) >= self._limits.open_requests or (full and self._tasks):
            text = f"{len(self._tasks)} requests of this peer are unanswered already; wait for some"
            self._control.send(FrameType.FAILURE, Failure(call.number, "NetworkError", text))
            return
        task = self._spawn(self._answer(call, payload))
        self._tasks[call.number] = task
        size = len(payload)
        self._bytes += size
        task.add_done_callback(lambda _: self._ended(call.number, size))

    def cancel(self, number: int) -> bool:
        """Stop working on a request. Return whether it was worked on."""
        task = self._tasks.get(number)
        if task is not None:
            task.cancel()
        return task is not None

    def _ended(self, number: int, size: int) -> None:
        self._tasks.pop(number, None)
        self._bytes -= size

    async def _answer(self, call: Call, payload: bytes) -> None:
        failure: Failure | None = None
        answer = b""
        try:
            answer = await self._work(call.kind, payload)
            if len(answer) > self._answer_bytes:
                raise ProtocolError(
                    f"the answer to {call.kind!r} has {len(answer):,} bytes, {self._who} takes "
                    f"{self._answer_bytes:,}; it belongs into bulk"
                )
        except FusionError as error:
            failure = Failure(call.number, error_name(error), short_text(error))
        except Exception as error:
            log.exception("request %s of %s failed", call.kind, self._who)
            text = f"the peer failed on {call.kind!r} with an unexpected {type(error).__name__}; its log says more"
            failure = Failure(call.number, "NetworkError", text)
        await self._control.drain()
        if self._closed():
            return
        if failure is not None:
            wire_bytes = self._control.send(FrameType.FAILURE, failure)
        else:
            wire_bytes = self._control.send(FrameType.ANSWER, Reply(call.number), answer)
        self._statistics.count_sent(call.kind, len(answer), wire_bytes)
