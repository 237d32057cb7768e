"""The tracer's symbolic sizes, written in the grammar of sizes, come to the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from fusionai.graph.capture.size_expressions import UnknownSizeError, size_expression
from fusionai.graph.sizes import evaluate

SIZES = [
    lambda b, t: b * t,
    lambda b, t: b + t * 3 - 1,
    lambda b, t: (b * t) // 3 + 1,
    lambda b, t: (b + 5) % 4 + t,
    lambda b, t: b * b * t,
    lambda b, t: (t - 1) * (b + 2),
    lambda b, t: (t + 3) // 2 * 2,
    lambda b, t: torch.sym_max(b, t + 1),
    lambda b, t: torch.sym_min(b * 2, t),
    lambda b, t: 7,
]


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_expression_has_the_value_of_the_size(number: int) -> None:
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(SIZES[number](x.shape[0], x.shape[1]))

    program = torch.export.export(Sized(), (torch.zeros(5, 8),), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    placeholder, *_, output = program.graph.nodes
    names = {size.node.expr.name: f"s{axis}" for axis, size in enumerate(placeholder.meta["val"].shape)}
    expression = size_expression(output.args[0][0].meta["val"].shape[0], names)
    for batch, length in ((5, 8), (2, 3), (9, 4), (31, 17)):
        assert evaluate(expression, {"s0": batch, "s1": length}) == SIZES[number](batch, length)


def test_unknown_symbols_are_refused() -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    program = torch.export.export(Counting(), (torch.ones(4),))
    *_, output = program.graph.nodes
    with pytest.raises(UnknownSizeError, match="depends on the values"):
        size_expression(output.args[0][0].meta["val"].shape[0], {})
