"""How jobs are named between the machines of a pool."""

from __future__ import annotations

from typing import NewType

JobId = NewType("JobId", str)
"""A job of a pool, as its broker names it."""
