"""The driver's watch over its machines: what happens to them becomes waiting, or the end of the job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fusionai.errors import JobError, NetworkError, PeerLost, ProtocolError
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import JobId
from fusionai.pool.job_wire import JobMessage, JobWire
from fusionai.scheduling.job_events import JobEvent, LinkLost, Stalled, sentence
from fusionai.scheduling.recovery import PATIENCE, EndJob, JobView, LookAgain, decide
from fusionai.training.machine import Machine


class JobWatch:
    """Speaks to the machines of a job, and knows whether the job still lives. Make it inside the event loop."""

    def __init__(self, job: JobId, wire: JobWire, machines: Sequence[Machine]) -> None:
        self.machines = tuple(machines)
        self._job = job
        self._wire = wire
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- what happens -------------------------------------------------------------------------------------------

    def happened(self, event: JobEvent, *, waited_s: float = 0.0) -> None:
        """Do what is to be done about an event (`scheduling.recovery`).

        When it ends the job, whatever is awaited raises JobError with the event's sentence. The first such event
        counts.
        """
        for action in decide(self._view(event, waited_s), event):
            if isinstance(action, LookAgain):
                later = partial(self.happened, event, waited_s=waited_s + action.seconds)
                asyncio.get_running_loop().call_later(action.seconds, later)
            elif isinstance(action, EndJob) and not self._failure.done():
                self._failure.set_exception(JobError(self._sentence(action.because)))
                self._failure.exception()  # somebody awaits it, or nobody needs to

    def link_lost(self, peer: PeerId, error: NetworkError) -> None:
        """A link is gone; of a machine of the job that is an event."""
        if any(machine.peer == peer for machine in self.machines):
            self.happened(LinkLost(self._wire.me, peer, str(error)))

    @property
    def failed(self) -> bool:
        """Whether the job cannot go on."""
        return self._failure.done()

    async def check(self) -> None:
        """Raise what has ended the job, if anything has."""
        if self._failure.done():
            await self._failure

    def close(self) -> None:
        """Stop watching: nothing is awaited any more."""
        self._failure.cancel()

    # --- waiting for machines -------------------------------------------------------------------------------------

    async def guard(self, work: Awaitable[object]) -> None:
        """Await `work`, or raise what ended the job meanwhile."""
        task: asyncio.Future[object] = asyncio.ensure_future(work)
        waited: set[asyncio.Future[Any]] = {task, self._failure}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self._failure
            await task
        except PeerLost as error:
            # The close of the link is on its way to `link_lost`, which knows the machine's name.
            await asyncio.wait({self._failure}, timeout=1.0)
            if self._failure.done():
                await self._failure
            raise JobError(f"a compnode is lost: {error}") from error
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # where the job has ended first, nobody else asks for it

    async def patiently(self, awaited: asyncio.Event, stalled: Stalled) -> None:
        """Wait for what machines owe, as long as the policy has patience. Raises JobError then."""
        while True:
            (action,) = decide(self._view(stalled), stalled)
            if not isinstance(action, LookAgain):
                raise JobError(self._sentence(stalled))
            try:
                await asyncio.wait_for(awaited.wait(), action.seconds)
                return
            except TimeoutError:
                stalled = replace(stalled, waited_s=stalled.waited_s + action.seconds)

    # --- speaking to machines -------------------------------------------------------------------------------------

    async def tell(self, message: JobMessage) -> None:
        """Send every machine a notice. Raises JobError when one of them is lost."""
        for machine in self.machines:
            try:
                await self._wire.notify(machine.peer, message)
            except PeerLost as error:
                self.link_lost(machine.peer, error)
        await self.check()

    async def ask(self, machine: Machine, message: JobMessage, *, timeout_s: float) -> bytes:
        """Send a machine a request, and return its answer. Raises JobError with its name, where it does not answer."""
        try:
            return await self._wire.request(machine.peer, message, timeout_s=timeout_s)
        except NetworkError as error:
            raise JobError(f"compnode {machine.name} ({machine.holding}): {error}") from error

    def machine(self, peer: PeerId) -> Machine:
        """Return the machine of a peer. Raises ProtocolError when it has no part in the job."""
        for machine in self.machines:
            if machine.peer == peer:
                return machine
        raise ProtocolError(f"{peer[:12]} has no part in job {self._job!r}")

    # --- inside -----------------------------------------------------------------------------------------------

    def _view(self, event: JobEvent, waited_s: float = 0.0) -> JobView:
        mended = isinstance(event, LinkLost) and self._wire.linked(PeerId(event.there))
        return JobView(seen_by="driver", patience=PATIENCE, driver=self._wire.me, waited_s=waited_s, mended=mended)

    def _sentence(self, event: JobEvent) -> str:
        def name(peer: str) -> str:
            return self.machine(PeerId(peer)).name

        def who(peer: str) -> str:
            return f"compnode {name(peer)} ({self.machine(PeerId(peer)).holding})"

        return sentence(event, name=name, who=who)
