"""Generations of a job: planned anew while it runs, it goes on under a derived id, "<job>.1", "<job>.2", ..."""

from __future__ import annotations

from fusionai.pool.identifiers import JobId


def generation(job: JobId, number: int) -> JobId:
    """Return the id of a job's generation; 0 is the job as it was launched."""
    return job if number == 0 else JobId(f"{job}.{number}")


def family(job: JobId) -> JobId:
    """Return the job that a generation is of."""
    return JobId(job.partition(".")[0])
