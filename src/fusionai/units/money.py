"""Amounts of money as people read them."""

from __future__ import annotations


def usd_text(amount: float) -> str:
    """Return US dollars to the cent; an amount below one dollar in two digits."""
    return f"{amount:,.2f} USD" if amount >= 1 or amount == 0 else f"{amount:.2g} USD"
