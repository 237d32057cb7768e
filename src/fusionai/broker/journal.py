"""Writes the broker's records to its store in the background: many changes in few transactions, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fusionai.broker.records import JobRecord, LinkRecord, MemberRecord
from fusionai.broker.store import Record, Store
from fusionai.errors import StorageError
from fusionai.network.identity import PeerId
from fusionai.pool.background_tasks import BackgroundTasks

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

WRITE_EVERY_S = 0.1
"""How long a change may wait for others to share its transaction."""
RETRY_S = 5.0
"""Pause after the disk refused a write. Meanwhile the newest version of each record is kept in memory."""


class Journal:
    """Keeps the newest version of every changed record until it is written, so its memory is bounded by the pool."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store = open_store
        self._store: Store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fusionai-store")
        self._changed: dict[tuple[str, str], Record] = {}
        self._dropped: set[PeerId] = set()
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tasks = BackgroundTasks()

    async def open(self) -> None:
        """Open the store. Raises StorageError."""
        try:
            self._store = await self._call(self._open_store)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self._tasks.start(self._write_behind(), "journal")

    async def load(self) -> tuple[list[MemberRecord], list[JobRecord], list[LinkRecord]]:
        """Return all members, jobs and links of the store."""
        return await self._call(lambda: (self._store.members(), self._store.jobs(), self._store.links()))

    async def get(self, name: str) -> str | None:
        """Return a setting."""
        return await self._call(lambda: self._store.get(name))

    async def put(self, name: str, value: str) -> None:
        """Keep a setting."""
        await self._call(lambda: self._store.put(name, value))

    def keep(self, record: Record) -> None:
        """Have a record written soon."""
        self._changed[_key(record)] = record
        if isinstance(record, MemberRecord):
            self._dropped.discard(record.peer)
        self._wake.set()

    def drop(self, peer: PeerId) -> None:
        """Have a member deleted soon, with its links."""
        self._changed.pop(("member", peer), None)
        self._dropped.add(peer)
        self._wake.set()

    async def flush(self) -> None:
        """Write all changes now. Raises StorageError; they are kept for another attempt then."""
        async with self._writing:
            changed, self._changed = self._changed, {}
            dropped, self._dropped = self._dropped, set()
            try:
                if dropped:
                    await self._call(lambda: self._store.forget(sorted(dropped)))
                if changed:
                    await self._call(lambda: self._store.save(list(changed.values())))
            except BaseException:
                self._changed = {**changed, **self._changed}
                back = {record.peer for record in self._changed.values() if isinstance(record, MemberRecord)}
                self._dropped |= dropped - back
                raise

    async def close(self) -> None:
        """Write what is left, and close the store."""
        await self._tasks.close()
        try:
            await self.flush()
        except StorageError as error:
            log.error("the broker's last changes are not on disk: %s", error)
        await self._call(self._store.close)
        self._thread.shutdown(wait=True)

    async def _write_behind(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(WRITE_EVERY_S)
            self._wake.clear()
            try:
                await self.flush()
            except StorageError as error:
                log.error("%s", error)
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _call(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _key(record: Record) -> tuple[str, str]:
    match record:
        case MemberRecord():
            return "member", record.peer
        case JobRecord():
            return "job", record.job
        case LinkRecord():
            return "link", f"{record.source}>{record.target}"
