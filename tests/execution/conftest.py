"""The planes that the framework-neutral checks run on."""

from __future__ import annotations

import pytest

from fusionai.execution.plane import Plane
from fusionai.execution.planes import available_planes, plane


@pytest.fixture(params=available_planes())
def any_plane(request: pytest.FixtureRequest) -> Plane:
    """Each plane whose framework is installed, one after the other, with one CPU thread: graphs here are small."""
    made = plane(request.param)
    made.set_threads(1)
    return made
