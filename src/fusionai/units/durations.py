"""Durations as people write and read them."""

from __future__ import annotations

import math
import re

from fusionai.errors import ConfigError

_UNITS_S = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_LONG_S = {"years": 365.25 * 86400.0, "d": 86400.0, "h": 3600.0}


def parse_duration(text: str, *, name: str) -> float:
    """Return the seconds of a text such as "90s", "20min", "1.5h" or "2d".

    Raises:
        ConfigError: the text is no duration above 0. The error calls the value `name`.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(ms|s|min|h|d)\s*", text)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else math.nan
    if seconds == 0:
        raise ConfigError(f"{name} must be above 0, got {text!r}; write such as 90s, 20min, 1.5h or 2d")
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{name} {text!r} is no duration; write such as 90s, 20min, 1.5h or 2d")
    return seconds


def duration_text(seconds: float) -> str:
    """Return seconds as people read them: in the largest unit that fits at least twice, or in milliseconds."""
    if seconds >= 2 * _UNITS_S["h"]:
        return seconds_text(seconds)
    for unit in ("min", "s"):
        if seconds >= 2 * _UNITS_S[unit]:
            return f"{seconds / _UNITS_S[unit]:.3g} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def seconds_text(seconds: float) -> str:
    """Return seconds as people read them; from two hours on in hours, days or years, the largest that fits twice."""
    for unit, length_s in _LONG_S.items():
        if seconds >= 2 * length_s:
            return f"{_three_digits(seconds / length_s)} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{float(f'{value:.3g}'):,.0f}"
