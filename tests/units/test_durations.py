"""Durations as people write and read them."""

from __future__ import annotations

import pytest

from fusionai.errors import ConfigError
from fusionai.units.durations import duration_text, parse_duration, seconds_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20min", 1200), (" 1.5 h ", 5400), ("2d", 172800), ("250ms", 0.25), (".5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, name="--x") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "6", "h", "-1h", "1e400s", "nan s", "1 week", "1h20min"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--x .* is no duration; write such as"):
        parse_duration(text, name="--x")


@pytest.mark.parametrize("text", ["0s", "0.0 h", " 0ms "])
def test_no_time_at_all(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--x must be above 0, got .*; write such as"):
        parse_duration(text, name="--x")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (1.5, "1.50 s"), (90, "90 s"), (600, "10 min"), (86400, "24 h"), (1e6, "11.6 d")],
)
def test_words(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (635.17, "635.17 s"),
        (7199.0, "7199.00 s"),
        (15728.71, "4.37 h"),
        (8.04e4 * 86400, "220 years"),
        (20613761553.65, "653 years"),
        (3.2e13, "1,010,000 years"),
        (400 * 86400, "400 d"),
    ],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
    if seconds >= 7200:
        assert duration_text(seconds) == text
