"""A TCP relay that counts what passes: every byte of payload that two machines put on a connection between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType

_CHUNK_BYTES = 256 << 10


class Relay:
    """Listens on a loopback port and passes connections on. Use as a context manager; runs in a thread of its own."""

    def __init__(self, target: Callable[[], int]) -> None:
        """`target` gives the loopback port to pass connections to; it is asked at each connection."""
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay")
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.passed_bytes = 0
        """In both directions, counted when they leave their sender. Read it from any thread."""
        self.port = 0

    @property
    def address(self) -> str:
        """Where to connect."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Relay:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=_CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            onward = await asyncio.open_connection("127.0.0.1", self._target(), limit=_CHUNK_BYTES)
            both = (self._pass(reader, onward[1]), self._pass(onward[0], writer))
            try:
                await asyncio.gather(*both)
            finally:
                onward[1].transport.abort()
        except OSError:
            pass  # either side is gone, or was not there: the other one sees a closed connection
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            self.passed_bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.write_eof()
