"""Requests on a link: those of this side that wait for their answers, and those of the peer that are worked on."""

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
"""What answers count as in the statistics when nobody waits for them any longer."""


class Asking:
    """This side's requests, each from its number to its answer, its failure or the end of the link."""

    def __init__(self) -> None:
        self._numbers = 0
        self._waiting: dict[int, tuple[str, asyncio.Future[bytes]]] = {}

    def open(self, kind: str) -> tuple[int, asyncio.Future[bytes]]:
        """Return a new request's number, and what its answer will be set on. Whoever opens it closes it."""
        self._numbers += 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[self._numbers] = (kind, answer)
        return self._numbers, answer

    def close(self, number: int) -> None:
        """Forget a request: what comes for it is late."""
        _, answer = self._waiting.pop(number)
        if answer.done() and not answer.cancelled():
            answer.exception()  # whoever asked may be gone: it is no error that nobody looks at it

    def kind(self, number: int) -> str:
        """Return the kind of a request, as what its answer counts."""
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
        """Wake everybody who waits: the link is gone."""
        for _, answer in self._waiting.values():
            if not answer.done():
                # Anew for each: one exception object raised by several waiters would mix their tracebacks.
                answer.set_exception(type(error)(str(error)))


class Answering:
    """The peer's requests in work, each in a task of its own; what comes of it is sent back.

    Args:
        control: where answers and failures go.
        limits: requests and bytes in work from which further ones are refused.
        answer_bytes: the longest answer that the peer takes.
        work: answers a request by kind and payload. A FusionError is raised by the peer's `request`.
        spawn: starts a task that ends with the link.
        closed: whether the link has ended, and nothing is to be sent any more.
        who: the peer, for people.
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
        """Start to work on a request, or refuse it where too many are in work. Raises ProtocolError."""
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
        """Stop to work on a request; return whether it was in work."""
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
