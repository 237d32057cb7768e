"""`fusionai train`: train a job on a pool. This machine drives the job."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusionai.cli.job_options import PRIVACY_NOTE, add_overrides


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("train", help="train the job of a job file on a pool", epilog=PRIVACY_NOTE)
    parser.add_argument("job", type=Path, nargs="?", help="job file (TOML); optional with --resume")
    parser.add_argument("--broker", required=True, metavar="TOKEN", help="join token of the pool")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/NAME-DATE)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the newest checkpoint of a run")
    add_overrides(parser, "training.steps=500")
    parser.add_argument("--device", help="device for the stages that stay on this machine (default: the best)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for them")
    parser.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="where compnodes may dial this machine"
    )
    parser.add_argument(
        "--advertise",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="addresses by which others reach --listen",
    )
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from fusionai.cli.console import console, print_result
    from fusionai.cli.progress import LiveProgress
    from fusionai.cli.stopping import leave_at_once
    from fusionai.owner.job_file import job_of, train_job
    from fusionai.owner.membership import OwnerOptions

    job = job_of(arguments.job, arguments.resume, arguments.overrides)
    owner = OwnerOptions(
        token=arguments.broker,
        device=arguments.device,
        threads=arguments.threads,
        listen=arguments.listen,
        advertise=tuple(arguments.advertise),
    )
    with LiveProgress(console(arguments)) as progress:
        result = train_job(
            job,
            owner,
            run=arguments.run,
            resume=arguments.resume,
            observer=progress,
            second_interrupt=lambda: leave_at_once(json_wanted=arguments.json),
        )
    print_result(arguments, result)
    return 0
