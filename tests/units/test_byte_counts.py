"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest

from fusionai.errors import ConfigError
from fusionai.units.byte_counts import parse_memory


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8 * 10**9), ("512MiB", 512 << 20), ("1.5g", 1_500_000_000), ("2e9", 2 * 10**9), ("64 kB", 64_000)],
)
def test_memory_texts(text: str, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 apples", "0", "1e999", "8GB more"])
def test_bad_memory_texts(text: str) -> None:
    with pytest.raises(ConfigError, match="8GB"):
        parse_memory(text)
