"""Options that commands share: which job, which machines, and the files that results are written to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusionai.errors import ConfigError

if TYPE_CHECKING:
    from fusionai.simulation.hardware.what_if_pool import WhatIfPool
    from fusionai.training.config import JobConfig


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare `--set`, by which single fields of the job file are overridden."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        dest="overrides",
        help=f"override a field of the job file, such as {example}",
    )


PRIVACY_NOTE = (
    "A private job (placement.privacy, the default) sends no tokens and no labels to compnodes, but a compnode can "
    "reconstruct them from what it gets: use machines that you trust, or data that may be read."
)


def add_job_and_pool(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of commands that plan without a pool: a job file, a pool file, and overrides."""
    parser.add_argument("job", type=Path, help="job file (TOML); neither weights nor text are read")
    parser.add_argument("--pool", type=Path, required=True, metavar="POOL", help="pool file (TOML)")
    add_overrides(parser, "training.microbatches=64")
    parser.epilog = PRIVACY_NOTE


def job_and_pool(arguments: argparse.Namespace) -> tuple[JobConfig, WhatIfPool]:
    """Return the job and the pool that the options name. Raises ConfigError naming the file and the field."""
    from fusionai.owner.pool_file import read_pool

    # Read the pool first: its mistakes are found at once, but reading a job loads torch, which takes seconds.
    what_if = read_pool(arguments.pool)
    from fusionai.owner.job_file import job_of

    return job_of(arguments.job, None, arguments.overrides), what_if


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Raise ConfigError naming the option whose file cannot be written. Call it before computing anything."""
    for option, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: {path.parent} is no folder; name a file in a folder")
        if path is not None and path.is_dir():
            raise ConfigError(f"{option} {path} is a folder; name a file")


def write_file(option: str, path: Path, text: str) -> None:
    """Write a file that an option names. Raises ConfigError when the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}; name a file that can be written") from error
