"""The jobs of the pool, running and over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from msgspec.structs import replace

from fusionai.broker.records import OVER, JobRecord
from fusionai.broker.store import MOST_JOBS
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import JobId
from fusionai.pool.messages import JobStatus

MOST_SHOWN = 50
"""Newest jobs that a status lists."""


class JobBook:
    """All jobs remembered, oldest first. Every change is handed to `keep`."""

    def __init__(self, keep: Callable[[JobRecord], None]) -> None:
        self._keep = keep
        self._jobs: dict[JobId, JobRecord] = {}

    def restore(self, records: Iterable[JobRecord]) -> None:
        """Take jobs from before a restart."""
        self._jobs = {record.job: record for record in records}

    def put(self, record: JobRecord) -> None:
        """Add a job, or replace its record."""
        self._jobs[record.job] = record
        self._keep(record)
        if len(self._jobs) > MOST_JOBS:
            oldest = next((each.job for each in self._jobs.values() if each.state in OVER), None)
            if oldest is not None:
                del self._jobs[oldest]

    def change(self, job: JobId, **fields: Any) -> JobRecord:
        """Replace fields of a job's record."""
        record = replace(self._jobs[job], **fields)
        self.put(record)
        return record

    def get(self, job: JobId) -> JobRecord | None:
        """Return a job's record."""
        return self._jobs.get(job)

    def active(self) -> list[JobRecord]:
        """Return the jobs that are not over."""
        return [each for each in self._jobs.values() if each.state not in OVER]

    def of_owner(self, peer: PeerId) -> list[JobRecord]:
        """Return an owner's jobs that are not over."""
        return [each for each in self.active() if each.owner == peer]

    def status(self) -> tuple[JobStatus, ...]:
        """Return active jobs and the newest others as `fusionai status` shows them."""
        newest = list(self._jobs.values())[-MOST_SHOWN:]
        shown = {each.job: each for each in [*self.active(), *newest]}
        return tuple(
            JobStatus(
                job=each.job,
                name=each.name,
                owner=each.owner_name,
                state=each.state,
                reason=each.reason,
                step=each.step,
                steps=each.steps,
                loss=each.loss,
                tokens_per_s=each.tokens_per_s,
                compnodes=tuple(each.compnodes.values()),
            )
            for each in sorted(shown.values(), key=lambda each: each.submitted_s)
        )
