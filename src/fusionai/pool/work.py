"""A kind of work that machines of a pool can do, such as training: what hosting needs to know of it.

A further kind is one file: a table of its messages, a way to unpack what the broker assigns, and a host for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from fusionai.pool.contacts import Contact
from fusionai.pool.identifiers import JobEpoch
from fusionai.pool.job_wire import JobWire, MessageKinds


class AssignedWork(Protocol):
    """A share of a job and its roster, as unpacked from what the broker sent."""

    @property
    def plan(self) -> JobEpoch:
        """The job and epoch that the share is made for."""

    @property
    def memory_bytes(self) -> int:
        """What the share takes of this machine's memory by the plan that it belongs to."""

    @property
    def driver(self) -> str:
        """The peer that drives the job; work whose driver never comes is dropped."""

    @property
    def contacts(self) -> Sequence[Contact]:
        """All machines to hold links with."""


class WorkHost(Protocol):
    """One share at work on this machine."""

    @property
    def description(self) -> str:
        """What is held, in a line for people."""

    @property
    def busy_s(self) -> float:
        """Compute seconds since the share came here."""

    @property
    def memory_bytes(self) -> int:
        """What its program holds now."""

    @property
    def bytes_sent(self) -> Mapping[str, int]:
        """Tensor bytes sent so far, by receiving peer."""

    def limit_memory(self, limit_bytes: int) -> None:
        """Take no more than this from now on: other work came or went."""

    async def close(self, reason: str) -> None:
        """Stop; when a call returns, the memory is free. May be called again, at the same time too."""


_Work = TypeVar("_Work", bound=AssignedWork)


class WorkKind(Protocol[_Work]):
    """One kind of work: its messages, and the hosts of its shares."""

    @property
    def name(self) -> str:
        """What the broker calls it in `AssignShare`."""

    @property
    def messages(self) -> MessageKinds:
        """What its machines say to each other."""

    def unpack(self, packed: bytes) -> _Work:
        """Return what the broker assigned. May take long: it is called in a thread.

        Raises ProtocolError or GraphError where it is malformed.
        """

    async def host(
        self,
        work: _Work,
        wire: JobWire,
        *,
        limit_bytes: int,
        on_end: Callable[[str], Awaitable[None]],
    ) -> WorkHost | None:
        """Put a share to work, and return its host; None where the machine holds nothing of the job.

        Args:
            work: what `unpack` returned.
            wire: carries the messages of jobs.
            limit_bytes: what it may take of this machine's memory.
            on_end: awaited once, with the reason, when the share ends by itself: its driver ends it or is lost, or it
                failed.
        """
