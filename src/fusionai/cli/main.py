"""The entry of the command line: arguments, errors and exit statuses. Each command has a file of its own.

No large package is imported before a command runs, because `fusionai --help` must answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fusionai.errors import ConfigError, FusionError

COMMANDS = ("demo", "broker", "join", "plan", "simulate", "paper", "train", "generate", "status")
"""Modules of `fusionai.cli`, each with `add_parser(subparsers)` and `run(arguments) -> int`."""

INTERRUPTED = 130
UNEXPECTED = 1


class _CommandParser(argparse.ArgumentParser):
    """Raises ConfigError for bad arguments, so that `--json` applies to them too."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit status: 0, a FusionError's status, 130 for Ctrl-C or SIGTERM, or 1 for a bug."""
    words = list(sys.argv[1:] if argv is None else argv)
    json_wanted, debug = "--json" in words, "--debug" in words
    try:
        arguments = _parser().parse_args(words)
        json_wanted, debug = arguments.json, arguments.debug
        with _terminated_as_interrupted():
            return _run(arguments)
    except KeyboardInterrupt as interrupt:
        status = _failed(json_wanted, "KeyboardInterrupt", str(interrupt) or "interrupted", INTERRUPTED)
        _leave_threads()
        return status
    except FusionError as error:
        if debug:
            _trace()
        return _failed(json_wanted, type(error).__name__, str(error), error.exit_status)
    except Exception as error:
        if debug:
            _trace()
        text = f"unexpected {type(error).__name__}: {error}"
        remedy = "" if debug else " (a bug of FusionAI; run again with --debug for the traceback)"
        return _failed(json_wanted, type(error).__name__, text.strip() + remedy, UNEXPECTED)


def _run(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "exit_with_parent", False):
        # This comes before anything slow: a parent may die while its child still imports torch.
        from fusionai.cli.parent_watch import watch_parent

        watch_parent()
    from fusionai.cli.logging_setup import set_up_logging

    set_up_logging(verbose=arguments.verbose, quiet=arguments.quiet, log_file=arguments.log_file)
    status: int = arguments.run_command(arguments)
    return status


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Make SIGTERM end a command as Ctrl-C does, so that its job and its child processes end in order."""

    def handler(number: int, frame: FrameType | None) -> None:
        on_interrupt = signal.getsignal(signal.SIGINT)
        if callable(on_interrupt):
            on_interrupt(number, frame)
        else:  # SIGINT is ignored: a shell does so for background jobs
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = _CommandParser(
        prog="fusionai",
        description="Pool ordinary GPUs over the internet to train models that none of them could train alone.",
    )
    parser.add_argument("--version", action="version", version=f"fusionai {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"fusionai.cli.{name}").add_parser(subparsers)
    for command in subparsers.choices.values():
        _add_shared(command)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="results on standard output as one JSON object a line")
    group.add_argument("-v", "--verbose", action="count", default=0, help="log what happens; twice: all details")
    group.add_argument("-q", "--quiet", action="store_true", help="log errors only, and show no progress")
    group.add_argument("--log-file", type=Path, metavar="FILE", help="append all logs to FILE, as JSON lines")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fusionai")
    except PackageNotFoundError:
        return "unknown"


def _failed(json_wanted: bool, kind: str, text: str, status: int) -> int:
    sys.stderr.write(f"error: {text}\n")
    if json_wanted:
        import json

        sys.stdout.write(json.dumps({"error": kind, "message": text}) + "\n")
        sys.stdout.flush()
    return status


def _leave_threads() -> None:
    """End the process now if a thread still works for the command that was interrupted.

    It may be reading a text or tracing a model for minutes. The interpreter would abort it within torch's code.
    """
    from fusionai.execution.own_thread import any_left

    if any_left():
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(INTERRUPTED)


def _trace() -> None:
    import traceback

    traceback.print_exc(file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
