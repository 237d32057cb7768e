"""Graphs whose declared types lie, and arguments at which a framework itself would fall over."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fusionai.errors import GraphError
from fusionai.execution.plane import MicrobatchKey, ProgramOptions
from fusionai.execution.planes import plane
from fusionai.execution.torch_plane.operators import torch_callable
from fusionai.graph.model import Argument, Input, Node, Ref, SubDag, TensorType, ValueName
from fusionai.graph.verify import verify_subdag
from fusionai.tensor import TensorData

X, OUT = ValueName("x"), ValueName("out")


def run(op: str, args: tuple[Argument, ...], declared: TensorType, **kwargs: Argument) -> TensorData:
    """Verify and run a stage of one operator on two zeros, and return its output."""
    given = Input(X, TensorType("float32", (2,)), "data", False)
    nodes = (
        Node(OUT, op, args, kwargs, (OUT,)),
        Node("loss", "aten.sum.default", (Ref(X),), {}, (ValueName("loss"),)),
    )
    types = {OUT: declared, ValueName("loss"): TensorType("float32", ())}
    subdag = SubDag(0, {}, (given,), (), nodes, types, (), (), ValueName("loss"))
    verify_subdag(subdag)
    program = plane("torch").load((subdag,), ProgramOptions())
    values = {X: TensorData("float32", (2,), bytes(8))}
    return program.forward(0, MicrobatchKey(0, 0), {}, values, train=False)[ValueName("loss")]


SMALL = TensorType("float32", (1,))
LIES: list[tuple[str, tuple[Argument, ...]]] = [
    ("aten.zeros.default", ((1 << 38,),)),
    ("aten.eye.default", (1 << 19,)),
    ("aten.repeat.default", (Ref(X), (1 << 37,))),
    ("aten.new_ones.default", (Ref(X), (1 << 20, 1 << 18))),
    ("aten.linspace.default", (0, 1, 1 << 38)),
    ("aten.constant_pad_nd.default", (Ref(X), (1 << 37, 0))),
]


@pytest.mark.parametrize(("op", "args"), LIES)
def test_a_result_larger_than_declared_is_never_made(op: str, args: tuple[Argument, ...]) -> None:
    start_s = time.monotonic()
    with pytest.raises(GraphError, match="but the OP-DAG says float32"):
        run(op, args, SMALL)
    assert time.monotonic() - start_s < 5


def test_arguments_that_torch_refuses_are_an_error_of_the_graph() -> None:
    with pytest.raises(GraphError, match=r"'aten\.view\.default' at 'out' cannot run"):
        run("aten.view.default", (Ref(X), (3, 5)), TensorType("float32", (3, 5)))
    with pytest.raises(GraphError, match="cannot run"):
        run("aten.zeros.default", ((-4,),), SMALL)


def test_honest_types_pass() -> None:
    assert run("aten.repeat.default", (Ref(X), (2,)), TensorType("float32", (4,))).shape == ()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("scalar", [False, True])
def test_the_least_integer_divided_by_minus_one(dtype: torch.dtype, scalar: bool) -> None:
    """Its quotient has no representation; the processor's division stops a process at it."""
    dividend = torch.tensor([torch.iinfo(dtype).min, 7, -7, 6], dtype=dtype)
    divisor: Any = -1 if scalar else torch.tensor([-1, -1, 2, -4], dtype=dtype)
    found = torch_callable("aten.div.Tensor_mode")(dividend, divisor, rounding_mode="trunc")
    assert found.dtype == dtype
    expected = [torch.iinfo(dtype).min, -7, 7, -6] if scalar else [torch.iinfo(dtype).min, -7, -3, -1]
    assert found.tolist() == expected


@pytest.mark.parametrize("mode", [None, "trunc", "floor"])
def test_other_divisions_are_torchs(mode: str | None) -> None:
    for dividend, divisor in ((torch.randn(50), torch.randn(50)), (torch.arange(-9, 9), torch.arange(1, 19))):
        found = torch_callable("aten.div.Tensor_mode")(dividend, divisor, rounding_mode=mode)
        wanted = torch.div(dividend, divisor, rounding_mode=mode)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
