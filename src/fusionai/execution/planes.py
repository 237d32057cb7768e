"""The execution planes that this installation can run, by name.

A plane's framework is imported when the plane is asked for, so that the command line starts without it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from fusionai.errors import ConfigError
from fusionai.execution.plane import Plane


def _torch_plane() -> Plane:
    from fusionai.execution.torch_plane.plane import TorchPlane

    return TorchPlane()


_PLANES: dict[str, tuple[str, Callable[[], Plane]]] = {"torch": ("torch", _torch_plane)}
"""By name of a plane: the package that it needs, and a function that makes it."""


def available_planes() -> tuple[str, ...]:
    """Return the names of the planes whose framework is installed."""
    return tuple(name for name, (package, _) in _PLANES.items() if find_spec(package) is not None)


def plane(name: str) -> Plane:
    """Return the plane of that name. Raises ConfigError when it is unknown or its framework is missing."""
    available = available_planes()
    if name not in available:
        found = ", ".join(available) or "none"
        reason = f"needs the package {_PLANES[name][0]!r}" if name in _PLANES else "is unknown"
        raise ConfigError(f"execution plane {name!r} {reason}; available here: {found}")
    return _PLANES[name][1]()
