"""Speeds as people read them."""

from __future__ import annotations

from fusionai.units.machine_rates import bit_rate_text, byte_rate_text, flop_rate_text


def test_texts() -> None:
    assert bit_rate_text(1.25e9) == "10,000 Mbit/s"
    assert byte_rate_text(512.4e6) == "512 MB/s"
    assert flop_rate_text(1.234e12) == "1,234 GFLOP/s"
