"""How near a plane's numbers must be to plain torch's: the same bits on the torch plane, rounding apart on others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fusionai.execution.plane import Plane

RELATIVE = 1e-4
"""Distance allowed to another framework, in units of a tensor's norm: some thousand roundings of fp32."""


def exact(plane: Plane) -> bool:
    """Whether a plane must give the bits of plain torch."""
    return plane.name == "torch"


def assert_same(plane: Plane, found: Tensor, wanted: Tensor, name: str = "") -> None:
    """Compare a tensor of a plane with plain torch's."""
    wanted = wanted.detach()
    if exact(plane):
        assert torch.equal(found, wanted), name
    else:
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        found, wanted = found.double(), wanted.double()
        assert float((found - wanted).norm()) <= RELATIVE * float(wanted.norm()) + 1e-7, name


def assert_same_losses(plane: Plane, found: Sequence[float], wanted: Sequence[float]) -> None:
    """Compare losses of a plane with plain torch's."""
    assert list(found) == (list(wanted) if exact(plane) else pytest.approx(list(wanted), rel=RELATIVE))
