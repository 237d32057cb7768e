"""The tables of `fusionai simulate`, for rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fusionai.simulation.bandwidth_sweep import SweepPoint
from fusionai.simulation.simulation_report import SimulationReport
from fusionai.units.byte_counts import bytes_text
from fusionai.units.durations import seconds_text
from fusionai.units.money import usd_text

_MOST_ROWS = 20


def report_view(report: SimulationReport, names: Mapping[str, str] | None = None) -> Group:
    """Return the whole report: summary, machines, links, failures. `names` are machines' names by peer."""
    named = names or {}
    parts: list[Table | Text] = [summary_table(report), Text(), machines_table(report, named)]
    if report.links:
        parts += [Text(), links_table(report, named)]
    if report.failures:
        parts += [Text(), failures_table(report, named)]
    return Group(*parts)


def summary_table(report: SimulationReport) -> Table:
    """Return the figures of the whole run."""
    table = Table("", "", box=None, show_header=False)
    table.add_row("steps", f"{report.steps:,} of {report.microbatches:,} microbatches; {report.ended_because}")
    table.add_row("time", seconds_text(report.elapsed_s))
    speed = f"{report.microbatches_per_s:.4g} microbatches/s"
    if report.tokens_per_s is not None:
        speed += f", {report.tokens_per_s:,.4g} tokens/s"
    table.add_row("throughput", speed)
    table.add_row(
        "step",
        f"median {seconds_text(report.median_step_s)}, 95 % within {seconds_text(report.p95_step_s)}; "
        f"{report.passes_share:.0%} passes, {1 - report.passes_share:.0%} sums, commit and update",
    )
    table.add_row("utilisation", f"{report.utilisation:.1%} of the plan's machines' time")
    table.add_row("sent", bytes_text(report.sent_bytes))
    if report.snapshots or report.snapshots_skipped:
        table.add_row("snapshots", f"{report.snapshots} begun, {report.snapshots_skipped} skipped")
    if report.failures:
        table.add_row(
            "lost", f"{seconds_text(report.lost_s)} of computing; {seconds_text(report.recomputed_s)} computed again"
        )
    if report.energy_j or report.rent_usd:
        missing = f"; {len(report.unpriced)} machines without a price" if report.unpriced else ""
        table.add_row(
            "cost",
            f"{report.energy_j / 3.6e6:.3g} kWh, {usd_text(report.electricity_usd)} of electricity, "
            f"{usd_text(report.rent_usd)} of rent{missing}",
        )
    return table


def machines_table(report: SimulationReport, names: Mapping[str, str] | None = None) -> Table:
    """Return the busiest machines."""
    table = Table("machine", "busy", "bubble", "absent", "sent", "received", "energy", box=None)
    for each in sorted(report.machines, key=lambda machine: (-machine.utilisation, machine.peer))[:_MOST_ROWS]:
        table.add_row(
            (names or {}).get(each.peer, each.peer),
            f"{each.utilisation:.0%}",
            f"{each.bubble:.0%}",
            seconds_text(each.absent_s) if each.absent_s else "",
            bytes_text(each.sent_bytes),
            bytes_text(each.received_bytes),
            f"{each.energy_j / 3.6e6:.3g} kWh" if each.energy_j else "",
        )
    _note_rest(table, len(report.machines))
    return table


def links_table(report: SimulationReport, names: Mapping[str, str] | None = None) -> Table:
    """Return the links that are occupied longest."""
    named = names or {}
    table = Table("link", "occupied", "sent", box=None)
    for each in sorted(report.links, key=lambda link: (-link.busy_s, link.source, link.target))[:_MOST_ROWS]:
        share = each.busy_s / report.elapsed_s if report.elapsed_s else 0.0
        ends = (named.get(end, end) or "driver" for end in (each.source, each.target))
        table.add_row(" -> ".join(ends), f"{share:.0%}", bytes_text(each.sent_bytes))
    _note_rest(table, len(report.links))
    return table


def failures_table(report: SimulationReport, names: Mapping[str, str] | None = None) -> Table:
    """Return the first failures."""
    named = names or {}
    table = Table("died", "at", "in step", "backup", "state from", "steps replayed", "recovered after", box=None)
    for each in report.failures[:_MOST_ROWS]:
        table.add_row(
            named.get(each.peer, each.peer),
            seconds_text(each.died_s),
            str(each.step + 1),
            named.get(each.backup, each.backup) if each.backup is not None else "none",
            each.state_from,
            str(each.replayed_steps),
            seconds_text(each.recovery_s) if each.recovery_s is not None else "never",
        )
    _note_rest(table, len(report.failures))
    return table


def sweep_table(points: Sequence[SweepPoint]) -> Table:
    """Return a sweep over bandwidths."""
    table = Table("bandwidth", "microbatches/s", "step", "utilisation", box=None)
    for each in points:
        table.add_row(
            f"x {each.factor:g}",
            f"{each.microbatches_per_s:.4g}",
            seconds_text(each.median_step_s),
            f"{each.utilisation:.0%}",
        )
    return table


def _note_rest(table: Table, count: int) -> None:
    if count > _MOST_ROWS:
        table.add_row(f"... and {count - _MOST_ROWS:,} more", *[""] * (len(table.columns) - 1))
