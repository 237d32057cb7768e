"""Writes the result of a simulated job as sentences."""

from __future__ import annotations

from collections.abc import Iterator

from fusionai.cli.forecast_words import assumed_line, named
from fusionai.scheduling.plan import PRIVATE_LINE
from fusionai.simulation.forecast.simulated_job import SimulatedJob
from fusionai.units.byte_counts import bytes_text
from fusionai.units.durations import duration_text, seconds_text
from fusionai.units.money import usd_text

_AS_LONG = 0.005
"""Relative difference between simulated and predicted step that needs no explanation."""

_DISTURBANCES = {
    "--churn": "machines that leave, and the snapshots made because they may (--churn)",
    "--jitter": "speeds that vary (--jitter)",
    "--codec": "how tensors are sent (--codec)",
}


def sentences(found: SimulatedJob) -> Iterator[str]:
    """Yield a simulated job's result, one sentence on each line."""
    report, job = found.report, found.job
    yield ""
    if found.pipelines > 1:
        yield (
            f"This plan has {found.pipelines} pipelines. Training runs one today, so it is not what a broker would do "
            "yet."
        )
    yield _steps(found)
    if not report.finished:
        yield (
            f"The job did not get through: {report.ended_because}. Machines that stay longer (--churn), more spare "
            "machines in the pool file, or more frequent snapshots (--snapshot-steps) would help."
        )
    if report.failures:
        over = [each.recovery_s for each in report.failures if each.recovery_s is not None]
        mean = f"; recovering took {duration_text(sum(over) / len(over))} on average" if over else ""
        yield f"Failures of machines at work: {len(report.failures)}{mean}. Another --seed draws others."
    if job is not None:
        rent = f", {usd_text(job.rent_usd)} of rent" if job.rent_usd else ""
        yield (
            f"At this pace the job's {job.steps:,} steps take {duration_text(job.elapsed_s)}, {job.energy_kwh:,.3g} "
            f"kWh ({usd_text(job.electricity_usd)} of electricity){rent}, and {bytes_text(job.sent_bytes)} sent."
        )
    if found.plan.privacy == "private":
        yield f"{PRIVATE_LINE.capitalize()}."
    if report.unpriced:
        yield f"Without power or price: {named(tuple(found.names.get(each, each) for each in report.unpriced))}."
    if found.unrented:
        yield f"Nobody publishes a rent for: {named(found.unrented)}; they count with electricity alone."
    yield ""
    yield from (assumed_line(each) for each in found.assumed)


def _steps(found: SimulatedJob) -> str:
    """Return how long a step takes, and why that differs from the planner's prediction."""
    text = f"The planner predicted {seconds_text(found.predicted_step_s)} for a step"
    if not found.report.step_s:
        return f"{text}."
    median_s, undisturbed_s = found.report.median_step_s, found.undisturbed_step_s
    text += f"; simulated, the median is {seconds_text(median_s)}."
    disturbed = bool(found.disturbed_by) and _differ(median_s, undisturbed_s)
    if lines := _differ(undisturbed_s, found.predicted_step_s):
        text += " Of tensors that find a line free, the plan sends another one first"
        text += f": that alone makes it {seconds_text(undisturbed_s)}." if disturbed else "."
    if disturbed:
        causes = ", ".join(_DISTURBANCES[each] for each in found.disturbed_by)
        text += f" What makes the {'rest of the ' if lines else ''}difference: {causes}."
    return text


def _differ(one_s: float, other_s: float) -> bool:
    return abs(one_s - other_s) > _AS_LONG * other_s
