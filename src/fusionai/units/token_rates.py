"""Speeds of training and generating as people read them."""

from __future__ import annotations


def rate_text(tokens_per_s: float) -> str:
    """Return tokens per second; fewer than ten in two digits."""
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 10 else f"{tokens_per_s:.2g} tokens/s"
