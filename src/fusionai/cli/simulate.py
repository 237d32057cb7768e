"""`fusionai simulate`: execute a job's plan step by step in a simulator, for the machines of a pool file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fusionai.cli.job_options import add_job_and_pool, check_writable, job_and_pool, write_file

if TYPE_CHECKING:
    from fusionai.simulation.forecast.simulated_job import SimulationOptions
    from fusionai.training.config import JobConfig

_MOST_STEPS = 100
"""Most steps that are simulated by default. The figures of the whole job are computed from them."""

_FACTORS = 7
"""Number of bandwidths in a sweep."""

_DEFAULT_SWEEP = "0.1-10"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "simulate", help="execute a job's plan for the machines of a pool file, in a simulator"
    )
    add_job_and_pool(parser)
    parser.add_argument(
        "--pipelines", action="store_true", help="execute the best plan of many pipelines, which training cannot do yet"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"steps to simulate; without it the job's, at most {_MOST_STEPS}"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of churn and jitter; default 0")
    faults = parser.add_argument_group("machines that leave, and vary")
    faults.add_argument(
        "--churn",
        metavar="UP[,DOWN]",
        help="machines leave after UP and are back after DOWN, on average, such as 6h,20min; DOWN is 10min if left out",
    )
    faults.add_argument(
        "--recovery",
        choices=("replay", "restart"),
        default="replay",
        help="a backup computes the lost stage again (replay, the default), or everybody begins from a checkpoint",
    )
    faults.add_argument(
        "--snapshot-steps", type=int, default=20, metavar="N", help="steps between two snapshots; default 20"
    )
    faults.add_argument("--detection", default="1s", metavar="TIME", help="until a death is noticed; default 1s")
    faults.add_argument(
        "--jitter",
        default="0",
        metavar="SPREAD[,DRIFT]",
        help="standard deviation of machines' speeds by chance and by slow drift, as shares, such as 0.05,0.1",
    )
    links = parser.add_argument_group("links")
    links.add_argument(
        "--codec",
        default="none",
        metavar="none|topk:RATIO",
        help="how tensors are sent: as they are, or one element in RATIO (time only, not convergence)",
    )
    links.add_argument(
        "--sweep",
        metavar="LOW-HIGH",
        help=f"execute the plan over LOW to HIGH times the bandwidth of all links too, such as {_DEFAULT_SWEEP}",
    )
    money = parser.add_argument_group("cost")
    money.add_argument("--usd-per-kwh", type=float, default=0.15, metavar="USD", help="of electricity; default 0.15")
    money.add_argument("--rent", action="store_true", help="count the catalogue's rent of the compnodes, where known")
    files = parser.add_argument_group("files")
    files.add_argument("--timeline", type=Path, metavar="FILE", help="draw the passes of the first two steps as SVG")
    files.add_argument(
        "--bandwidth-picture",
        type=Path,
        metavar="FILE",
        help=f"draw throughput against bandwidth as SVG; sweeps {_DEFAULT_SWEEP} unless --sweep says otherwise",
    )
    files.add_argument("--write", type=Path, metavar="FILE", help="write what --json prints to FILE")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from fusionai.cli.console import console, print_result

    # Check the options first, because torch takes seconds to load.
    files = {"--timeline": arguments.timeline, "--bandwidth-picture": arguments.bandwidth_picture}
    check_writable({**files, "--write": arguments.write})
    if any(path is not None for path in files.values()):
        from fusionai.cli.simulation_pictures import require_matplotlib

        require_matplotlib()
    _simulation_options(arguments, steps=1)
    job, what_if = job_and_pool(arguments)
    from fusionai.cli.simulation_tables import report_view, sweep_table
    from fusionai.cli.simulation_words import sentences
    from fusionai.owner.what_if import simulate_job

    found = simulate_job(
        job, what_if, _simulation_options(arguments, _steps(arguments, job)), pipelines=arguments.pipelines
    )
    screen = console(arguments)
    screen.print(report_view(found.report, found.names))
    if found.sweep:
        screen.print()
        screen.print(sweep_table(found.sweep))
    for line in sentences(found):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)
    if arguments.timeline is not None:
        from fusionai.cli.simulation_pictures import timeline_svg

        write_file("--timeline", arguments.timeline, timeline_svg(found.report, found.names))
    if arguments.bandwidth_picture is not None:
        from fusionai.cli.simulation_pictures import throughput_svg

        write_file("--bandwidth-picture", arguments.bandwidth_picture, throughput_svg(found.sweep))
    if arguments.write is not None:
        import msgspec

        write_file("--write", arguments.write, msgspec.json.encode(found).decode() + "\n")
    print_result(arguments, found)
    return 0


def _steps(arguments: argparse.Namespace, job: JobConfig) -> int:
    given: int | None = arguments.steps
    return min(job.training.steps, _MOST_STEPS) if given is None else given


def _simulation_options(arguments: argparse.Namespace, steps: int) -> SimulationOptions:
    """Return the simulation that the options describe. Raises ConfigError that names the option."""
    from fusionai.errors import ConfigError
    from fusionai.simulation.forecast.simulated_job import SimulationOptions
    from fusionai.simulation.simulated_recovery import Recovery, Replay, Restart
    from fusionai.units.durations import parse_duration

    if arguments.steps is not None and arguments.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.snapshot_steps < 1:
        raise ConfigError(f"--snapshot-steps must be at least 1, got {arguments.snapshot_steps}")
    if not 0 <= arguments.usd_per_kwh < float("inf"):
        raise ConfigError(f"--usd-per-kwh must be at least 0 and finite, got {arguments.usd_per_kwh}")
    mean_up_s, mean_down_s = None, 600.0
    if arguments.churn is not None:
        up, comma, down = arguments.churn.partition(",")
        mean_up_s = parse_duration(up, name="--churn")
        mean_down_s = parse_duration(down, name="--churn") if comma else mean_down_s
    kept = {
        "snapshot_steps": arguments.snapshot_steps,
        "detection_s": parse_duration(arguments.detection, name="--detection"),
    }
    recovery: Recovery = Replay(**kept) if arguments.recovery == "replay" else Restart(**kept)
    low_high = arguments.sweep or (_DEFAULT_SWEEP if arguments.bandwidth_picture is not None else "")
    jitter, drift = _jitter(arguments.jitter)
    return SimulationOptions(
        steps=steps,
        seed=arguments.seed,
        mean_up_s=mean_up_s,
        mean_down_s=mean_down_s,
        # Without churn no machine dies, and snapshots would only slow every step down.
        recovery=recovery if mean_up_s is not None else Replay(),
        top_k=_top_k(arguments.codec),
        jitter=jitter,
        drift=drift,
        usd_per_kwh=arguments.usd_per_kwh,
        rented=arguments.rent,
        factors=_factors(low_high) if low_high else (),
        timeline_steps=2 if arguments.timeline is not None else 0,
    )


def _top_k(text: str) -> float | None:
    from fusionai.errors import ConfigError

    if text == "none":
        return None
    kind, _, ratio = text.partition(":")
    found = _number(ratio) if kind == "topk" else None
    if found is None or found < 1:
        raise ConfigError(
            f"--codec {text!r} is unknown; write none, or topk:RATIO with a RATIO of at least 1: topk:100"
        )
    return found


def _jitter(text: str) -> tuple[float, float]:
    from fusionai.errors import ConfigError

    numbers = [_number(each) for each in text.split(",")]
    if len(numbers) > 2 or any(each is None or not 0 <= each < 10 for each in numbers):
        raise ConfigError(f"--jitter {text!r} is no share from 0 to 10, or two; write such as 0.05 or 0.05,0.1")
    spread, drift = [each or 0.0 for each in (*numbers, 0.0)][:2]
    return spread, drift


def _factors(text: str) -> tuple[float, ...]:
    """Return the factors of a sweep, evenly spaced on a logarithmic scale. 1 is among them if it lies in the range."""
    from fusionai.errors import ConfigError

    # The first "-" may be of an exponent: 1e-3-10.
    match = re.fullmatch(r"(.*?[^eE])-(.+)", text)
    low, high = (_number(match[1]), _number(match[2])) if match else (None, None)
    if low is None or high is None or not 1e-6 <= low < high <= 1e6:
        raise ConfigError(
            f"--sweep {text!r} is no range of factors; write LOW-HIGH with 0.000001 <= LOW < HIGH <= 1000000, such as "
            f"{_DEFAULT_SWEEP}"
        )
    found = {low * (high / low) ** (place / (_FACTORS - 1)) for place in range(_FACTORS)}
    found = {float(f"{each:.3g}") for each in found}
    return tuple(sorted(found | ({1.0} if low <= 1 <= high else set())))


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if abs(found) < float("inf") else None
