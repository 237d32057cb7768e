"""Records of older databases in the form of today's. Pure."""

from __future__ import annotations

from typing import Any

import msgspec


def upgraded_job(text: str) -> str:
    """Return a job's record of schema 1 as one of schema 2.

    Plans of schema 1 had one pipeline, whose stages stood in the plan itself. They did not say how long the end of a
    step takes.
    """
    record: dict[str, Any] = msgspec.json.decode(text)
    for holder in (record, record.get("preparing") or {}):
        plan = holder.get("plan")
        if plan and "pipelines" not in plan:
            stages = plan.pop("stages")
            plan["pipelines"] = [
                {"stages": stages, "microbatches": plan["microbatches"], "predicted_s": plan["predicted_step_s"]}
            ]
            plan["end_of_step_s"] = 0.0
    # A plan that was being prepared is given up at a restart anyway, and schema 1 named it by a text.
    record["preparing"] = None
    record.pop("generations", None)
    return msgspec.json.encode(record).decode()
