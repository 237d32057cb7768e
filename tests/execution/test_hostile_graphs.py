"""Graphs whose declared types lie, and arguments at which a framework itself would fall over."""

from __future__ import annotations

import time

import pytest

from fusionai.errors import GraphError
from fusionai.execution.plane import Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey
from fusionai.graph.model import Argument, Input, Node, Ref, SubDag, TensorType, ValueName
from fusionai.graph.verify import verify_subdag
from fusionai.tensor import TensorData

X, OUT = ValueName("x"), ValueName("out")


def run(plane: Plane, op: str, args: tuple[Argument, ...], declared: TensorType, **kwargs: Argument) -> TensorData:
    """Verify and run a stage of one operator on two zeros, and return its output."""
    given = Input(X, TensorType("float32", (2,)), "data", False)
    nodes = (
        Node(OUT, op, args, kwargs, (OUT,)),
        Node("loss", "aten.sum.default", (Ref(X),), {}, (ValueName("loss"),)),
    )
    types = {OUT: declared, ValueName("loss"): TensorType("float32", ())}
    subdag = SubDag(0, {}, (given,), (), nodes, types, (), (), ValueName("loss"))
    verify_subdag(subdag)
    program = plane.load((subdag,), ProgramOptions())
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
def test_a_result_larger_than_declared_is_never_made(any_plane: Plane, op: str, args: tuple[Argument, ...]) -> None:
    start_s = time.process_time()
    with pytest.raises(GraphError, match="but the OP-DAG says float32"):
        run(any_plane, op, args, SMALL)
    assert time.process_time() - start_s < 5


def test_arguments_that_torch_refuses_are_an_error_of_the_graph(any_plane: Plane) -> None:
    with pytest.raises(GraphError, match=r"'aten\.view\.default' at 'out' cannot run"):
        run(any_plane, "aten.view.default", (Ref(X), (3, 5)), TensorType("float32", (3, 5)))
    with pytest.raises(GraphError, match="cannot run"):
        run(any_plane, "aten.zeros.default", ((-4,),), SMALL)


def test_honest_types_pass(any_plane: Plane) -> None:
    assert run(any_plane, "aten.repeat.default", (Ref(X), (2,)), TensorType("float32", (4,))).shape == ()
