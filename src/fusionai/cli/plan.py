"""`fusionai plan`: predict how fast the pool of a pool file would train a job, before anybody joins."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fusionai.cli.job_options import add_job_and_pool, job_and_pool

if TYPE_CHECKING:
    from rich.console import Console

    from fusionai.simulation.forecast.forecast import Forecast


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("plan", help="predict what the machines of a pool file would give a job")
    add_job_and_pool(parser)
    parser.add_argument(
        "--no-what-if",
        action="store_false",
        dest="what_ifs",
        help="the plan alone, without single machines and better pools: a fourth of the time for large models",
    )
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from fusionai.cli.console import console, print_result
    from fusionai.cli.forecast_words import sentences

    job, what_if = job_and_pool(arguments)
    from fusionai.owner.what_if import forecast_job

    found = forecast_job(job, what_if, what_ifs=arguments.what_ifs)
    screen = console(arguments)
    _show(screen, found)
    for line in sentences(found):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)
    print_result(arguments, found)
    return 0


def _show(screen: Console, found: Forecast) -> None:
    from rich.table import Table

    from fusionai.units.byte_counts import bytes_text
    from fusionai.units.durations import seconds_text

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "machine", "holds", "memory of offer", "a microbatch", "busy"):
        table.add_column(column, overflow="fold")
    for each in found.stages:
        table.add_row(
            str(each.stage),
            each.machine,
            each.holds,
            f"{bytes_text(each.memory_bytes)} of {bytes_text(each.offered_bytes)}",
            seconds_text(each.seconds),
            f"{each.busy:.0%}",
        )
    screen.print(table)
