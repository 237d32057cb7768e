"""A decoder of any depth as a hand-made OP-DAG, and machines to plan it for."""

from __future__ import annotations

from typing import Any

from fusionai.graph.model import Dim, Input, Node, OpDag, Ref, Size, TensorType, ValueName, Weight, WeightKey
from fusionai.graph.vocabulary import VOCABULARY_VERSION
from fusionai.scheduling.profile import DeviceProfile, LinkProfile, Member, Pool

SIZES = {"b": 1, "t": 128}
GB = 10**9


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.types: dict[ValueName, TensorType] = {}
        self.weights: list[Weight] = []

    def call(self, op: str, *args: Any, shape: tuple[Dim, ...], scope: str, **kwargs: Any) -> Ref:
        name = ValueName(f"v{len(self.nodes)}")
        self.nodes.append(Node(name, op, args, kwargs, (name,), scope))
        self.types[name] = TensorType("float32", shape)
        return Ref(name)

    def weight(self, key: str, *shape: int, name: str | None = None) -> Ref:
        value = ValueName(name or f"w_{key.replace('.', '_')}")
        self.weights.append(Weight(value, WeightKey(key), TensorType("float32", shape), "parameter", True))
        return Ref(value)


def decoder(layers: int, *, hidden: int = 64, vocabulary: int = 256, fillers: int = 0, tied: bool = False) -> OpDag:
    """Return embedding, `layers` blocks of norm, two linears and an addition, and a head with its loss.

    `fillers` more elementwise operators in each block bring the graph to the size of a real one.
    """
    build = _Builder()
    hidden_shape: tuple[Dim, ...] = ("b", "t", hidden)
    wide_shape: tuple[Dim, ...] = ("b", "t", 4 * hidden)
    table = build.weight("embed.weight", vocabulary, hidden)
    x = build.call("aten.embedding.default", table, Ref(ValueName("ids")), shape=hidden_shape, scope="embed")
    for layer in range(layers):
        scope = f"layers.{layer}"
        gain, shift = build.weight(f"{scope}.norm.weight", hidden), build.weight(f"{scope}.norm.bias", hidden)
        up = build.weight(f"{scope}.up.weight", 4 * hidden, hidden)
        down = build.weight(f"{scope}.down.weight", hidden, 4 * hidden)
        y = build.call("aten.layer_norm.default", x, (hidden,), gain, shift, shape=hidden_shape, scope=f"{scope}.norm")
        y = build.call("aten.linear.default", y, up, shape=wide_shape, scope=f"{scope}.up")
        for _ in range(fillers):
            y = build.call("aten.neg.default", y, shape=wide_shape, scope=scope)
        y = build.call("aten.silu.default", y, shape=wide_shape, scope=scope)
        y = build.call("aten.linear.default", y, down, shape=hidden_shape, scope=f"{scope}.down")
        x = build.call("aten.add.Tensor", x, y, shape=hidden_shape, scope=scope)
    head = (
        build.weight("embed.weight", vocabulary, hidden, name="w_head")
        if tied
        else build.weight("head.weight", vocabulary, hidden)
    )
    logits = build.call("aten.linear.default", x, head, shape=("b", "t", vocabulary), scope="head")
    flat = build.call("aten.view.default", logits, (Size("b*t"), vocabulary), shape=("b*t", vocabulary), scope="loss")
    labels = build.call("aten.view.default", Ref(ValueName("labels")), (Size("b*t"),), shape=("b*t",), scope="loss")
    build.types[labels.name] = TensorType("int64", ("b*t",))
    loss = build.call("aten.cross_entropy_loss.default", flat, labels, shape=(), scope="loss")
    tokens = TensorType("int64", ("b", "t"))
    return OpDag(
        vocabulary=VOCABULARY_VERSION,
        name="decoder",
        symbols={"b": (ValueName("ids"), 0), "t": (ValueName("ids"), 1)},
        inputs=(
            Input(ValueName("ids"), tokens, "tokens", private=True),
            Input(ValueName("labels"), tokens, "labels", private=True),
        ),
        weights=tuple(build.weights),
        nodes=tuple(build.nodes),
        types=build.types,
        loss=loss.name,
    )


def member(
    name: str, *, gflops: float = 100.0, memory_bytes: int = 64 * GB, dialable: bool = True, device: str = "cpu"
) -> Member:
    """Return a machine named `name`, its peer "p-" before that."""
    profile = DeviceProfile(
        name=f"device of {name}",
        device=device,
        plane="torch",
        plane_version="0",
        memory_bytes=memory_bytes,
        threads=1,
        flops_per_s={"matmul": gflops * 1e9, "attention": gflops * 5e8, "convolution": gflops * 5e8},
        memory_bytes_per_s=gflops * 1e8,
        overhead_s=1e-6,
    )
    return Member(f"p-{name}", name, profile, ("127.0.0.1:1",) if dialable else (), dialable)


def pool(*members: Member, rtt_s: float = 1e-3, bytes_per_s: float = 1e9, owner: Member | None = None) -> Pool:
    """Return a pool whose links, the owner's included, are all alike."""
    everyone = [*members, *([owner] if owner else [])]
    links = {
        f"{one.peer}>{other.peer}": LinkProfile(rtt_s, bytes_per_s)
        for one in everyone
        for other in everyone
        if one is not other
    }
    return Pool(members, links)
