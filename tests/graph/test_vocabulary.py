"""The vocabulary's claims, each against torch itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_examples import examples
from torch_calls import function, one_call, storages

from fusionai.errors import GraphError
from fusionai.graph.activation_memory import kept_bytes
from fusionai.graph.calls import StageCalls
from fusionai.graph.model import Keyword, Node, Ref, Size, ValueName
from fusionai.graph.operators.schema import Operator, Parameter
from fusionai.graph.vocabulary import VOCABULARY, operator

ATEN = [name for name in VOCABULARY if name.startswith("aten.")]

TYPES = {
    "tensor": ("Tensor",),
    "operand": ("Tensor",),
    "tensors": ("List[Tensor]",),
    "int": ("int", "SymInt"),
    "ints": ("List[int]", "List[SymInt]"),
    "float": ("float",),
    "floats": ("List[float]",),
    "number": ("number",),
    "bool": ("bool",),
    "string": ("str",),
    "dtype": ("ScalarType", "int"),
    "device": ("Device",),
    "layout": ("Layout", "int"),
    "memory_format": ("MemoryFormat", "int"),
}


def plain(parameter: Parameter) -> Any:
    default = parameter.default
    if isinstance(default, Keyword):
        return default.word
    return list(default) if isinstance(default, tuple) else default


@pytest.mark.parametrize("name", ATEN)
def test_signature_is_that_of_torch(name: str) -> None:
    ours, theirs = operator(name), function(name)._schema
    by_name = {argument.name: argument for argument in theirs.arguments}
    order = [argument.name for argument in theirs.arguments if not argument.kwarg_only]
    assert [each.name for each in ours.parameters if not each.keyword_only] == order
    assert {each.name for each in ours.parameters} == by_name.keys()
    for parameter in ours.parameters:
        argument = by_name[parameter.name]
        found = str(argument.real_type).replace("Optional[Tensor]]", "Tensor]]")
        optional = found.startswith("Optional[")
        kind = found.removeprefix("Optional[").removesuffix("]") if optional else found
        assert optional == parameter.optional, parameter
        wanted = TYPES[parameter.kind]
        if parameter.items_optional:
            wanted = ("List[Tensor]", "List[Optional[Tensor]]")
        assert kind in (*wanted, *(f"{each}]" for each in wanted)), (parameter, found)
        assert parameter.required == (not argument.has_default_value()), parameter
        if argument.has_default_value() and parameter.kind not in ("dtype", "memory_format"):
            assert plain(parameter) == pytest.approx(argument.default_value), parameter


@pytest.mark.parametrize("name", ATEN)
def test_outputs_views_and_writes_are_those_of_torch(name: str) -> None:
    ours, theirs = operator(name), function(name)._schema
    written = {each.name for each in theirs.arguments if each.alias_info is not None and each.alias_info.is_write}
    viewed = {each.name for each in theirs.arguments if each.alias_info is not None} - written
    if len(theirs.returns) == 1 and "List" in str(theirs.returns[0].type):
        assert ours.outputs == "list"
    else:
        assert ours.outputs == len(theirs.returns)
    if written:
        assert set(ours.mutates) == written
    if viewed:
        assert ours.view in viewed


@pytest.mark.parametrize(("name", "args", "kwargs"), examples(), ids=lambda each: each if isinstance(each, str) else "")
def test_what_autograd_keeps(name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        subdag, outputs = one_call(name, args, kwargs)
    stage = StageCalls(subdag, {})
    (bound,) = stage.calls
    predicted, measured = kept_bytes(stage, bound), sum(storages(kept).values())
    assert predicted == pytest.approx(measured, rel=0.03, abs=256)
    given = [each for value in args for each in (value if isinstance(value, list) else [value])]
    shared = storages(each for each in given if isinstance(each, torch.Tensor)).keys()
    assert stage.is_alias(bound) == all(output.untyped_storage().data_ptr() in shared for output in outputs)


def test_every_differentiable_family_has_an_example() -> None:
    """The comparison above covers the operators that models consist of; few may be missing."""
    saving = {name for name in ATEN if operator(name).saves or operator(name).extra}
    missing = saving - {name for name, _, _ in examples()}
    assert len(missing) <= len(saving) // 4, sorted(missing)


@pytest.mark.parametrize("name", ["aten.linaer.default", "os.system", "", "aten.empty.memory_format", "x" * 10_000])
def test_unknown_operators_are_refused(name: str) -> None:
    with pytest.raises(GraphError) as caught:
        operator(name)
    assert len(str(caught.value)) < 500
    if name.startswith("aten.linaer"):
        assert "aten.linear.default" in str(caught.value)


def test_nothing_reads_uninitialised_memory_or_files() -> None:
    forbidden = ("empty", "from_file", "set_", "resize", "as_strided", "data_ptr", "_copy_from", "load", "save")
    for name in VOCABULARY:
        assert not any(word in name for word in forbidden), name


def call(op: str, *args: Any, outputs: int = 1, **kwargs: Any) -> Node:
    names = tuple(ValueName(f"y{place}") for place in range(outputs))
    return Node("y0", op, args, kwargs, names)


X = Ref(ValueName("x"))


def test_binding_fills_defaults() -> None:
    node = call("aten.topk.default", X, 2, outputs=2)
    assert operator(node.op).bind(node) == {"self": X, "k": 2, "dim": -1, "largest": True, "sorted": True}
    node = call("aten.view.default", X, (Size("s0"), -1))
    assert operator(node.op).bind(node)["size"] == (Size("s0"), -1)


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (call("aten.linear.default", X), "'weight' is missing"),
        (call("aten.linear.default", X, X, X, X), "at most 3"),
        (call("aten.linear.default", X, 3), "'weight' must be tensor"),
        (call("aten.linear.default", X, X, weight=X), "given twice"),
        (call("aten.linear.default", X, X, speed=1), "unknown argument 'speed'"),
        (call("aten.topk.default", X, 2), "1 outputs, the operator has 2"),
        (call("aten.topk.default", X, True, outputs=2), "'k' must be int"),
        (call("aten.to.dtype", X, Keyword("dtype", "float31")), "'dtype' must be dtype"),
        (call("aten.to.dtype", X, Keyword("device", "local")), "'dtype' must be dtype"),
        (call("aten.cat.default", (X, 1)), "'tensors' must be tensors"),
        (call("aten.cat.default", (X, None)), "'tensors' must be tensors"),
        (call("aten.split.Tensor", X, 1, outputs=0), "no outputs"),
    ],
)
def test_arguments_are_checked(node: Node, text: str) -> None:
    kind: Operator = operator(node.op)
    with pytest.raises(GraphError, match=text):
        kind.bind(node)
