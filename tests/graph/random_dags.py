"""Small random OP-DAGs, and their execution in numpy and in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fusionai.graph.dependencies import reads
from fusionai.graph.model import Input, Keyword, Node, OpDag, Ref, Size, TensorType, ValueName, Weight, WeightKey
from fusionai.graph.vocabulary import VOCABULARY_VERSION

VECTOR = TensorType("float32", ("n", 3))
TOKENS = TensorType("int64", ("n", 3))

_BINARY = {"add.Tensor": np.add, "mul.Tensor": np.multiply, "maximum.default": np.maximum}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "tanh.default": np.tanh,
    "neg.default": np.negative,
    "alias.default": lambda value: value,
    "detach.default": lambda value: value,
}

NUMPY: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": function for name, function in (_BINARY | _UNARY).items()},
    "aten.to.dtype": lambda value, _: value.astype(np.float32),
    "aten.add_.Tensor": lambda value, other: value + other,
    "aten.split.Tensor": lambda value, size, axis: np.split(value, value.shape[axis] // size, axis),
    "aten.cat.default": lambda values, axis: np.concatenate(values, axis),
    "aten.sum.default": lambda value: value.sum(),
    "aten.full.default": lambda size, value: np.full(size, value, np.float32),
}


@st.composite
def dags(draw: st.DrawFn) -> OpDag:
    """Draw an OP-DAG over vectors (n, 3): tokens, positions, trained and frozen weights, outputs, a sum as loss."""
    kinds = draw(st.lists(st.tuples(st.booleans(), st.sampled_from(["parameter", "buffer"])), min_size=1, max_size=4))
    weights = tuple(
        Weight(
            ValueName(f"w{place}"),
            WeightKey(f"key{place}"),
            TensorType("float32", (3,)),
            kind,  # type: ignore[arg-type]
            trained and kind == "parameter",
        )
        for place, (trained, kind) in enumerate(kinds)
    )
    floats: list[ValueName] = [weight.name for weight in weights]
    wide: list[ValueName] = []
    nodes: list[Node] = []
    types: dict[ValueName, TensorType] = {}

    def call(op: str, *args: Any, outputs: int = 1, type: TensorType = VECTOR) -> tuple[ValueName, ...]:
        names = tuple(ValueName(f"v{len(nodes)}_{place}") for place in range(outputs))
        nodes.append(Node(names[0], op, args, {}, names))
        types.update(dict.fromkeys(names, type))
        return names

    def to_float(name: str) -> ValueName:
        return call("aten.to.dtype", Ref(ValueName(name)), _FLOAT)[0]

    wide += [to_float("tokens"), to_float("positions")]
    wide += call("aten.full.default", (Size("n"), 3), 0.5)
    for _ in range(draw(st.integers(1, 12))):
        choice = draw(st.sampled_from(["unary", "binary", "binary", "split"]))
        operand = Ref(draw(st.sampled_from(wide)))
        if choice == "unary":
            wide += call(f"aten.{draw(st.sampled_from(sorted(_UNARY)))}", operand)
        elif choice == "binary":
            other = Ref(draw(st.sampled_from(wide + floats)))
            wide += call(f"aten.{draw(st.sampled_from(sorted(_BINARY)))}", operand, other)
        else:
            parts = call("aten.split.Tensor", operand, 1, 1, outputs=3, type=TensorType("float32", ("n", 1)))
            order = draw(st.permutations(parts))
            wide += call("aten.cat.default", tuple(Ref(part) for part in order), 1)
    (mixed,) = call("aten.mul.Tensor", Ref(draw(st.sampled_from(wide))), Ref(floats[0]))
    (loss,) = call("aten.sum.default", Ref(mixed), type=TensorType("float32", ()))
    return OpDag(
        vocabulary=VOCABULARY_VERSION,
        name="random",
        symbols={"n": (ValueName("tokens"), 0)},
        inputs=(
            Input(ValueName("tokens"), TOKENS, "tokens", True),
            Input(ValueName("positions"), TOKENS, "positions", False),
        ),
        weights=weights,
        nodes=tuple(nodes),
        types=types,
        loss=loss,
    )


_FLOAT = Keyword("dtype", "float32")


def feeds(graph: OpDag, rows: int) -> dict[ValueName, Any]:
    """Return numbers for the inputs and weights of a random graph."""
    random = np.random.default_rng(0)
    values: dict[ValueName, Any] = {
        ValueName("tokens"): random.integers(0, 5, (rows, 3)),
        ValueName("positions"): np.tile(np.arange(3), (rows, 1)),
    }
    for weight in graph.weights:
        values[weight.name] = random.normal(size=3).astype(np.float32)
    return values


def execute(
    nodes: Iterable[Node], values: Mapping[ValueName, Any], rows: int, functions: Mapping[str, Callable[..., Any]]
) -> dict[ValueName, Any]:
    """Run calls in order and return every value, given ones included; a call may only read what is there."""
    known = dict(values)

    def argument(value: Any) -> Any:
        if isinstance(value, tuple):
            return [argument(each) for each in value]
        if isinstance(value, Ref):
            return known[value.name]
        return rows if isinstance(value, Size) else value

    for node in nodes:
        assert all(name in known for name in reads(node)), f"{node.name} reads what is not here"
        result = functions[node.op](*(argument(each) for each in node.args))
        results = result if isinstance(result, list | tuple) else (result,)
        known.update(zip(node.outputs, results, strict=True))
    return known


def with_gradients(graph: OpDag, rows: int) -> set[ValueName]:
    """Return the values that torch's autograd computes a gradient for, trained weights included."""
    values: dict[ValueName, Any] = {name: torch.tensor(value) for name, value in feeds(graph, rows).items()}
    for weight in graph.weights:
        values[weight.name].requires_grad_(weight.trainable)

    def keeping(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            result = function(*args)
            for each in result if isinstance(result, tuple | list) else (result,):
                if each.requires_grad:
                    each.retain_grad()
            return result

        return run

    functions: dict[str, Callable[..., Any]] = {
        f"aten.{name}": keeping(getattr(torch.ops.aten, name.split(".")[0])) for name in (*_BINARY, *_UNARY)
    }
    functions |= {
        "aten.to.dtype": lambda value, _: value.to(torch.float32),
        "aten.split.Tensor": keeping(torch.split),
        "aten.cat.default": keeping(torch.cat),
        "aten.sum.default": keeping(torch.sum),
        "aten.full.default": torch.full,
    }
    known = execute(graph.nodes, values, rows, functions)
    if known[graph.loss].requires_grad:
        known[graph.loss].backward()
    return {name for name, value in known.items() if value.grad is not None}
