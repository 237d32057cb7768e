"""The output of commands: for people through rich, for programs as JSON lines on standard output."""

from __future__ import annotations

import argparse
import sys

import msgspec
from rich.console import Console


def console(arguments: argparse.Namespace) -> Console:
    """Return where a command prints for people: standard output, or with `--json` standard error."""
    return Console(stderr=arguments.json, quiet=arguments.quiet)


def print_result(arguments: argparse.Namespace, result: object) -> None:
    """With `--json`, print a result (a mapping or a msgspec struct) as one line. NaN and infinity become null."""
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        sys.stdout.flush()
