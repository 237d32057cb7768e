"""Amounts of memory and other counts of bytes, as people write and read them."""

from __future__ import annotations

import re

from fusionai.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_memory(text: str) -> int:
    """Return the bytes of a text such as "8GB", "512MiB" or "2e9".

    Raises:
        ConfigError: the text is no amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9.eE+]+)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    try:
        count = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count <= 0:
        raise ConfigError(f"{text!r} is no amount of memory; write such as 8GB or 512MiB")
    return count


def bytes_text(size_bytes: float, digits: int = 3) -> str:
    """Return bytes as people read them, in decimal units, with the given number of significant digits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.{digits}g} {unit}"
    return f"{size_bytes:.0f} bytes"
