"""What holds for all tests of commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quick_capture import remembered_captures


@pytest.fixture(scope="module", autouse=True)
def captures() -> Iterator[None]:
    """Capture each model once."""
    with remembered_captures():
        yield
