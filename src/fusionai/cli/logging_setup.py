"""Sets up logging: short lines on standard error, and with `--log-file` everything as JSON lines in a file."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from fusionai.errors import StorageError


class JsonLines(logging.Formatter):
    """Writes each record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        entry: dict[str, object] = {
            "time_s": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(*, verbose: int = 0, quiet: bool = False, log_file: Path | None = None) -> None:
    """Log warnings to standard error; with `verbose` more, with `quiet` errors only.

    Raises:
        StorageError: the log file cannot be written.
    """
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(level)
    terminal.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    handlers: list[logging.Handler] = [terminal]
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            lines = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"the log file {log_file} cannot be written: {error.strerror or error}") from error
        lines.setFormatter(JsonLines())
        handlers.append(lines)
    package = logging.getLogger("fusionai")
    package.setLevel(min(level, logging.INFO) if log_file is not None else level)
    package.propagate = False
    for old in package.handlers[:]:
        package.removeHandler(old)
        old.close()
    for handler in handlers:
        package.addHandler(handler)
