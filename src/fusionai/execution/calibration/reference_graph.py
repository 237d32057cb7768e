"""The decoder that devices are measured with: a small OP-DAG of the operators that real jobs have."""

from __future__ import annotations

from dataclasses import dataclass

from fusionai.graph.cuts import cut
from fusionai.graph.model import (
    Argument,
    Dim,
    Input,
    Node,
    OpDag,
    Ref,
    Size,
    SubDag,
    TensorType,
    ValueName,
    Weight,
    WeightKey,
)
from fusionai.graph.vocabulary import VOCABULARY_VERSION

_LAST = (1 << 63) - 1
_IDS, _LABELS = ValueName("ids"), ValueName("labels")


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder and of its microbatch."""

    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward part."""
    heads: int
    vocabulary: int
    batch: int
    tokens: int

    @property
    def sizes(self) -> dict[str, int]:
        """Return the numbers of the graph's symbols."""
        return {"b": self.batch, "t": self.tokens}


def reference_stage(shape: DecoderShape) -> SubDag:
    """Return the second of two stages: pre-norm blocks with gated feed-forward, head and loss, without the embedding.

    The stage receives a tensor and returns its gradient, so a plane does the same work as for a stage of a pipeline.
    """
    _, stage = cut(_Decoder(shape).graph(), [1])
    return stage


class _Decoder:
    def __init__(self, shape: DecoderShape) -> None:
        self._shape = shape
        self._nodes: list[Node] = []
        self._types: dict[ValueName, TensorType] = {}
        self._weights: list[Weight] = []

    def graph(self) -> OpDag:
        shape = self._shape
        table = self._weight("embedding", shape.vocabulary, shape.hidden)
        hidden = self._call("aten.embedding.default", (table, Ref(_IDS)), ("b", "t", shape.hidden))
        for layer in range(shape.layers):
            hidden = self._feed_forward(self._attention(hidden, layer), layer)
        head = self._weight("head", shape.vocabulary, shape.hidden)
        logits = self._call("aten.linear.default", (self._norm(hidden, "norm"), head), ("b", "t", shape.vocabulary))
        rows = Size("b*t")
        flat = self._call("aten.view.default", (logits, (rows, shape.vocabulary)), ("b*t", shape.vocabulary))
        labels = self._call("aten.view.default", (Ref(_LABELS), (rows,)), ("b*t",), dtype="int64")
        loss = self._call("aten.cross_entropy_loss.default", (flat, labels), ())
        tokens = TensorType("int64", ("b", "t"))
        return OpDag(
            vocabulary=VOCABULARY_VERSION,
            name="reference",
            symbols={"b": (_IDS, 0), "t": (_IDS, 1)},
            inputs=(
                Input(_IDS, tokens, "tokens", private=False),
                Input(_LABELS, tokens, "labels", private=False),
            ),
            weights=tuple(self._weights),
            nodes=tuple(self._nodes),
            types=self._types,
            loss=loss.name,
        )

    def _call(self, op: str, args: tuple[Argument, ...], shape: tuple[Dim, ...], *, dtype: str = "float32") -> Ref:
        name = ValueName(f"v{len(self._nodes)}")
        self._nodes.append(Node(name, op, args, {}, (name,)))
        self._types[name] = TensorType("int64" if dtype == "int64" else "float32", shape)
        return Ref(name)

    def _weight(self, key: str, *shape: int) -> Ref:
        name = ValueName(f"w_{key}")
        self._weights.append(Weight(name, WeightKey(key), TensorType("float32", shape), "parameter", True))
        return Ref(name)

    def _linear(self, value: Ref, key: str, width_in: int, width_out: int) -> Ref:
        weight = self._weight(key, width_out, width_in)
        return self._call("aten.linear.default", (value, weight), ("b", "t", width_out))

    def _norm(self, value: Ref, key: str) -> Ref:
        """Add a root-mean-square norm with the single operators that transformers' models use."""
        full: tuple[Dim, ...] = ("b", "t", self._shape.hidden)
        thin: tuple[Dim, ...] = ("b", "t", 1)
        square = self._call("aten.pow.Tensor_Scalar", (value, 2), full)
        mean = self._call("aten.mean.dim", (square, (-1,), True), thin)
        scale = self._call("aten.rsqrt.default", (self._call("aten.add.Tensor", (mean, 1e-6), thin),), thin)
        scaled = self._call("aten.mul.Tensor", (value, scale), full)
        return self._call("aten.mul.Tensor", (self._weight(key, self._shape.hidden), scaled), full)

    def _attention(self, hidden: Ref, layer: int) -> Ref:
        shape = self._shape
        width = shape.hidden // shape.heads
        full: tuple[Dim, ...] = ("b", "t", shape.hidden)
        split: tuple[Dim, ...] = ("b", shape.heads, "t", width)
        normed = self._norm(hidden, f"{layer}.norm")
        parts = []
        for part in ("query", "key", "value"):
            value = self._linear(normed, f"{layer}.{part}", shape.hidden, shape.hidden)
            size = (Size("b"), Size("t"), shape.heads, width)
            value = self._call("aten.view.default", (value, size), ("b", "t", shape.heads, width))
            value = self._call("aten.transpose.int", (value, 1, 2), split)
            parts.append(value if part == "value" else self._turned(value, split))
        mixed = self._call("fusion.attention", (*parts, 0, width**-0.5, 0, 0.0, True), split)
        mixed = self._call("aten.transpose.int", (mixed, 1, 2), ("b", "t", shape.heads, width))
        mixed = self._call("aten.contiguous.default", (mixed,), ("b", "t", shape.heads, width))
        mixed = self._call("aten.reshape.default", (mixed, (Size("b"), Size("t"), shape.hidden)), full)
        return self._call(
            "aten.add.Tensor", (hidden, self._linear(mixed, f"{layer}.output", shape.hidden, shape.hidden)), full
        )

    def _turned(self, value: Ref, split: tuple[Dim, ...]) -> Ref:
        """Add the operators of rotary positions on a query or a key, with numbers in place of the tables of sines."""
        width = self._shape.hidden // self._shape.heads
        halves: tuple[Dim, ...] = (*split[:3], width // 2)
        first = self._call("aten.slice.Tensor", (value, 3, 0, width // 2), halves)
        second = self._call("aten.slice.Tensor", (value, 3, width // 2, _LAST), halves)
        turned = self._call("aten.cat.default", ((self._call("aten.neg.default", (second,), halves), first), -1), split)
        return self._call(
            "aten.add.Tensor",
            (self._call("aten.mul.Tensor", (value, 0.8), split), self._call("aten.mul.Tensor", (turned, 0.6), split)),
            split,
        )

    def _feed_forward(self, hidden: Ref, layer: int) -> Ref:
        shape = self._shape
        full: tuple[Dim, ...] = ("b", "t", shape.hidden)
        wide: tuple[Dim, ...] = ("b", "t", shape.inner)
        normed = self._norm(hidden, f"{layer}.norm_inner")
        gate = self._linear(normed, f"{layer}.gate", shape.hidden, shape.inner)
        gate = self._call("aten.silu.default", (gate,), wide)
        up = self._linear(normed, f"{layer}.up", shape.hidden, shape.inner)
        down = self._linear(self._call("aten.mul.Tensor", (gate, up), wide), f"{layer}.down", shape.inner, shape.hidden)
        return self._call("aten.add.Tensor", (hidden, down), full)
