"""`fusionai paper`: fifty RTX 3080 against four H100, for the models, links and codecs that are asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusionai.cli.job_options import check_writable, write_file

_MODELS = ("bert-large", "gpt2-xl", "llama-8b", "gpt3-175b")
_RATES = (10.0, 100.0, 1000.0, 10_000.0)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("paper", help="predict what 50 RTX 3080 do against 4 H100, and where they keep up")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page (docs/paper.md) to FILE")
    parser.add_argument(
        "--models", nargs="+", choices=_MODELS, default=_MODELS, metavar="MODEL", help=f"of {', '.join(_MODELS)}"
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, default=_RATES, metavar="MBPS", help="links of the RTX 3080, in Mbit/s"
    )
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    import datetime
    from functools import partial

    from fusionai.cli.console import console, print_result
    from fusionai.errors import ConfigError

    rates = tuple(dict.fromkeys(arguments.rates))
    if wrong := [rate for rate in rates if not 0.001 <= rate <= 1e7]:
        raise ConfigError(f"--rates must be between 0.001 and 1e+07 Mbit/s, got {wrong[0]:g}")
    check_writable({"--write": arguments.write})
    from fusionai.cli.paper_page import page
    from fusionai.owner.headline_models import captured
    from fusionai.simulation.headline.headline_report import headline

    found = headline([partial(captured, name) for name in dict.fromkeys(arguments.models)], rates)
    text = page(found, datetime.datetime.now(datetime.UTC).date(), command=_command(arguments))
    if arguments.write is not None:
        write_file("--write", arguments.write, text)
    screen = console(arguments)
    screen.print(text, highlight=False, markup=False, soft_wrap=True)
    print_result(arguments, found)
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """Return the command line that makes this page again."""
    import shlex

    words = ["fusionai", "paper"]
    if tuple(arguments.models) != _MODELS:
        words += ["--models", *arguments.models]
    if tuple(arguments.rates) != _RATES:
        words += ["--rates", *(f"{rate:.12g}" for rate in arguments.rates)]
    if arguments.write is not None:
        words += ["--write", str(arguments.write)]
    return shlex.join(words)
