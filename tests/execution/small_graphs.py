"""Small OP-DAGs written by hand, a plain cut of them, and a pipeline of programs in one process.

Independent of capture and of `fusionai.graph.cuts`: the models are written twice, as a graph here and as plain
torch beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusionai.execution.program import MicrobatchKey, Program, RoundProgram
from fusionai.graph.model import (
    Input,
    Node,
    OpDag,
    Ref,
    Size,
    Sizes,
    SubDag,
    TensorType,
    Transfer,
    ValueName,
    Weight,
    WeightKey,
)
from fusionai.graph.vocabulary import VOCABULARY_VERSION
from fusionai.tensor import TensorData

VOCABULARY, WIDTH, HEADS, LONGEST = 31, 16, 4, 32
Tensors = dict[str, Tensor]


def data(tensor: Tensor) -> TensorData:
    """A tensor as data, through bytes: shares no code with the plane."""
    contiguous = tensor.detach().contiguous()
    raw = contiguous.reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorData(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw)  # type: ignore[arg-type]


def tensor(value: TensorData) -> Tensor:
    """The same way back."""
    dtype = getattr(torch, value.dtype)
    if not value.nbytes:
        return torch.empty(value.shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).view(value.shape)


class GraphMaker:
    """Collects operator calls; types are found by running each call on tensors of a sample size."""

    def __init__(self, sample: Sizes) -> None:
        self._sample = sample
        self._symbols: dict[str, tuple[ValueName, int]] = {}
        self._inputs: list[Input] = []
        self._weights: list[Weight] = []
        self._nodes: list[Node] = []
        self._types: dict[ValueName, TensorType] = {}

    def input(self, name: str, type: TensorType, role: str, *, private: bool = False) -> Ref:
        for axis, dim in enumerate(type.shape):
            if isinstance(dim, str):
                self._symbols.setdefault(dim, (ValueName(name), axis))
        self._inputs.append(Input(ValueName(name), type, role, private))  # type: ignore[arg-type]
        return Ref(ValueName(name))

    def weight(
        self, name: str, value: Tensor, *, key: str = "", kind: str = "parameter", trainable: bool = True
    ) -> Ref:
        dtype: Any = str(value.dtype).removeprefix("torch.")
        made = Weight(
            ValueName(name),
            WeightKey(key or name),
            TensorType(dtype, tuple(value.shape)),
            kind,  # type: ignore[arg-type]
            trainable and kind == "parameter",
        )
        self._weights.append(made)
        return Ref(made.name)

    def call(self, op: str, *args: Any, dtype: str = "float32", shape: Sequence[int | str], **kwargs: Any) -> Ref:
        name = ValueName(f"n{len(self._nodes)}")
        self._nodes.append(Node(name, op, args, kwargs, (name,)))
        self._types[name] = TensorType(dtype, tuple(shape))  # type: ignore[arg-type]
        return Ref(name)

    def graph(self, loss: Ref) -> OpDag:
        return OpDag(
            VOCABULARY_VERSION,
            "small",
            self._symbols,
            tuple(self._inputs),
            tuple(self._weights),
            tuple(self._nodes),
            self._types,
            loss.name,
        )


def language_model_graph(weights: Tensors, *, dropout: float = 0.0, window: int = 0, softcap: float = 0.0) -> OpDag:
    """One transformer block between tied embeddings, over (s0, s1) tokens."""
    maker = GraphMaker({"s0": 2, "s1": 8})
    tokens_type = TensorType("int64", ("s0", "s1"))
    hidden, split = ("s0", "s1", WIDTH), ("s0", HEADS, "s1", WIDTH // HEADS)
    ids = maker.input("ids", tokens_type, "tokens", private=True)
    positions = maker.input("positions", tokens_type, "positions")
    labels = maker.input("labels", tokens_type, "labels", private=True)
    held = {name: maker.weight(name.replace(".", "_"), value, key=name) for name, value in weights.items()}
    head = maker.weight("head", weights["embedding"], key="embedding")
    call = maker.call

    def norm(value: Ref, name: str) -> Ref:
        scale, shift = held[f"{name}.weight"], held[f"{name}.bias"]
        return call("aten.layer_norm.default", value, (WIDTH,), scale, shift, shape=hidden)

    def linear(value: Ref, name: str, width: int = WIDTH) -> Ref:
        weight, bias = held[f"{name}.weight"], held[f"{name}.bias"]
        return call("aten.linear.default", value, weight, bias, shape=("s0", "s1", width))

    def heads(value: Ref) -> Ref:
        shape = (Size("s0"), Size("s1"), HEADS, WIDTH // HEADS)
        parts = call("aten.view.default", value, shape, shape=("s0", "s1", HEADS, WIDTH // HEADS))
        return call("aten.transpose.int", parts, 1, 2, shape=split)

    x = call("aten.embedding.default", held["embedding"], ids, shape=hidden)
    p = call("aten.embedding.default", held["position"], positions, shape=hidden)
    x = call("aten.add.Tensor", x, p, shape=hidden)
    y = norm(x, "norm1")
    query, key, value = (heads(linear(y, name)) for name in ("query", "key", "value"))
    y = call(
        "fusion.attention", query, key, value, 0, 0.5, window, softcap, True, shape=split
    )  # head size 4: 1/sqrt = 0.5
    y = call("aten.transpose.int", y, 1, 2, shape=("s0", "s1", HEADS, WIDTH // HEADS))
    y = call("aten.reshape.default", y, (Size("s0"), Size("s1"), WIDTH), shape=hidden)
    y = call("aten.dropout.default", linear(y, "out"), dropout, True, shape=hidden)
    x = call("aten.add.Tensor", x, y, shape=hidden)
    y = linear(norm(x, "norm2"), "up", 4 * WIDTH)
    y = call("aten.gelu.default", y, shape=("s0", "s1", 4 * WIDTH))
    y = linear(y, "down")
    x = call("aten.add.Tensor", x, y, shape=hidden)
    logits = call("aten.linear.default", norm(x, "norm3"), head, shape=("s0", "s1", VOCABULARY))
    flat = call("aten.view.default", logits, (Size("s0*s1"), VOCABULARY), shape=("s0*s1", VOCABULARY))
    targets = call("aten.view.default", labels, (-1,), shape=("s0*s1",), dtype="int64")
    return maker.graph(call("aten.cross_entropy_loss.default", flat, targets, shape=()))


def language_model_weights() -> Tensors:
    """Fresh, fixed weights of `language_model_graph`."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {"embedding": random(VOCABULARY, WIDTH), "position": random(LONGEST, WIDTH)}
    for name in ("norm1", "norm2", "norm3"):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + random(WIDTH), random(WIDTH)
    for name, inner, outer in (
        *((name, WIDTH, WIDTH) for name in ("query", "key", "value", "out")),
        ("up", WIDTH, 4 * WIDTH),
        ("down", 4 * WIDTH, WIDTH),
    ):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = random(outer, inner), random(outer)
    return weights


def language_model_loss(weights: Mapping[str, Tensor], batch: Tensors) -> Tensor:
    """The same model as plain torch, without dropout."""
    ids, labels = batch["ids"], batch["labels"]
    size, length = ids.shape

    def linear(value: Tensor, name: str) -> Tensor:
        return functional.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(value: Tensor, name: str) -> Tensor:
        return functional.layer_norm(value, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    positions = torch.arange(length).expand(size, length)
    x = functional.embedding(ids, weights["embedding"]) + functional.embedding(positions, weights["position"])
    y = norm(x, "norm1")
    parts = [linear(y, n).view(size, length, HEADS, -1).transpose(1, 2) for n in ("query", "key", "value")]
    y = functional.scaled_dot_product_attention(*parts, is_causal=length > 1)
    x = x + linear(y.transpose(1, 2).reshape(size, length, WIDTH), "out")
    x = x + linear(functional.gelu(linear(norm(x, "norm2"), "up")), "down")
    logits = functional.linear(norm(x, "norm3"), weights["embedding"])
    return functional.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


def token_batch(step: int, index: int, size: int = 2, length: int = 8) -> Tensors:
    """A fixed batch of random tokens."""
    generator = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(VOCABULARY, (size, length), generator=generator)
    return {"ids": ids, "labels": ids.roll(-1, 1)}


def references(node: Node) -> set[ValueName]:
    """Names of the values that a node takes."""
    items = [
        part for item in (*node.args, *node.kwargs.values()) for part in (item if isinstance(item, tuple) else (item,))
    ]
    return {item.name for item in items if isinstance(item, Ref)}


def cut(graph: OpDag, positions: Sequence[int]) -> list[SubDag]:
    """Split a graph's nodes at the positions; every float value that crosses has a gradient."""
    bounds = [0, *positions, len(graph.nodes)]
    parts = [graph.nodes[start:stop] for start, stop in pairwise(bounds)]
    stage_of = {output: stage for stage, nodes in enumerate(parts) for node in nodes for output in node.outputs}
    transfers = []
    for target, nodes in enumerate(parts):
        used = sorted({name for node in nodes for name in references(node)})
        for name in used:
            if stage_of.get(name, target) != target:
                type = graph.types[name]
                transfers.append(Transfer(name, stage_of[name], target, type, type.dtype == "float32"))
    stages = []
    for index, nodes in enumerate(parts):
        used_here = {name for node in nodes for name in references(node)}
        made = {output for node in nodes for output in node.outputs}
        stages.append(
            SubDag(
                index,
                graph.symbols,
                tuple(item for item in graph.inputs if item.name in used_here),
                tuple(item for item in graph.weights if item.name in used_here),
                nodes,
                {name: graph.types[name] for name in made},
                tuple(item for item in transfers if item.target == index),
                tuple(item for item in transfers if item.source == index),
                graph.loss if graph.loss in made else None,
            )
        )
    return stages


class Pipeline:
    """Stages on programs, run one after the other in this process through `TensorData`."""

    def __init__(self, stages: Sequence[SubDag], programs: Mapping[int, RoundProgram]) -> None:
        self._stages = stages
        self._programs = programs

    def forward(self, key: MicrobatchKey, sizes: Sizes, batch: Tensors, *, train: bool = True) -> float:
        """Run a microbatch forward; return its loss."""
        values: dict[str, TensorData] = {name: data(value) for name, value in batch.items()}
        for stage in self._stages:
            names = [item.name for item in stage.inputs if item.role != "positions"]
            names += [item.value for item in stage.receives]
            given = {name: values[name] for name in names}
            values.update(self._programs[stage.index].forward(stage.index, key, sizes, given, train=train))
        loss = self._stages[-1].loss
        assert loss is not None
        return float(tensor(values[loss]))

    def backward(self, key: MicrobatchKey, loss_weight: float) -> None:
        """Run a microbatch backward."""
        gradients: dict[tuple[str, int], TensorData] = {}
        for stage in reversed(self._stages):
            given: dict[ValueName, list[TensorData]] = {}
            for item in sorted(stage.sends, key=lambda item: -item.target):
                if item.gradient:
                    given.setdefault(item.value, []).append(gradients[item.value, item.target])
            found = self._programs[stage.index].backward(stage.index, key, given, loss_weight)
            gradients.update({(name, stage.index): value for name, value in found.items()})

    def train(
        self,
        steps: int,
        microbatches: int,
        learning_rate: float,
        batch: Callable[[int, int], Tensors] = token_batch,
        sizes: Sizes | None = None,
    ) -> list[float]:
        """Train; return every microbatch's loss. All forwards come before the backwards, as in a pipeline."""
        losses = []
        for step in range(steps):
            keys = [MicrobatchKey(step, index) for index in range(microbatches)]
            for key in keys:
                losses.append(self.forward(key, sizes or {"s0": 2, "s1": 8}, batch(step, key.index)))
            for key in keys:
                self.backward(key, 1 / microbatches)
            for program in set(self._programs.values()):
                program.update(learning_rate)
        return losses


def load_weights(program: Program, weights: Mapping[str, Tensor]) -> None:
    """Load every weight that a program lacks."""
    for key in program.missing():
        program.load(key, data(weights[key]))


def train_plainly(
    loss: Callable[[Mapping[str, Tensor], Tensors], Tensor],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    microbatches: int,
    batch: Callable[[int, int], Tensors] = token_batch,
) -> list[float]:
    """The loop that a pipeline must equal."""
    losses = []
    for step in range(steps):
        for index in range(microbatches):
            value = loss(parameters, batch(step, index))
            (value * (1 / microbatches)).backward()
            losses.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses
