"""Repeated layers: instantiating them gives the very graph that tracing them all gives."""

from __future__ import annotations

import pytest
import torch
from tiny_language_models import language_model
from torch import Tensor, nn
from torch.nn import functional

from fusionai.graph.capture import capture, capture_transformers, tracing
from fusionai.graph.encoding import content_hash

torch.set_num_threads(1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of modules in each trace that capture makes."""
    sizes: list[int] = []
    original = tracing.trace

    def counting(root, inputs):  # type: ignore[no-untyped-def]
        sizes.append(sum(1 for _ in root.modules()))
        return original(root, inputs)

    monkeypatch.setattr("fusionai.graph.capture.modules.trace", counting)
    return sizes


@pytest.mark.parametrize(("family", "layers"), [("llama", 6), ("gemma3", 7), ("gpt2", 5)])
def test_equals_the_full_trace(family: str, layers: int, traced: list[int]) -> None:
    model = language_model(family, layers)
    short = capture_transformers(model, validate_values=family == "gemma3")
    full = capture_transformers(model, repeats=False, validate_values=False)
    assert short.graph == full.graph
    assert content_hash(short.graph) == content_hash(full.graph)
    assert len(traced) == 2
    assert traced[0] < traced[1], "the short capture did not trace fewer modules"
    assert sum(1 for name, _ in model.named_modules() if name.endswith(f".{layers - 1}")) == 1


class Layer(nn.Module):
    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.number = number

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + torch.tanh(self.norm(self.linear(x))) * scale


class Stack(nn.Module):
    """Layers that the tests call in regular and irregular ways."""

    def __init__(self, layers: int = 7, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, number) for number in range(layers)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.run(x), y)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def both(net: nn.Module, traced: list[int]) -> tuple[bool, int]:
    """Capture with and without repeats; return whether the graphs are equal, and the traces with repeats."""
    example = {"x": torch.randn(3, 8), "y": torch.randn(3, 8)}
    short = capture(net, example, roles={"y": "labels"}).graph
    traces = len(traced)
    smallest = min(traced)
    full = capture(net, example, roles={"y": "labels"}, repeats=False).graph
    return short == full, traces if smallest < traced[-1] else 0


def test_regular_stack_with_buffers(traced: list[int]) -> None:
    assert both(Stack(), traced) == (True, 1)


def test_sequential(traced: list[int]) -> None:
    net = Stack(1)
    net.layers = nn.ModuleList()
    net.body = nn.Sequential(*(Layer(8, number) for number in range(6)))
    net.run = lambda x: net.body(x)  # type: ignore[method-assign]
    assert both(net, traced) == (True, 1)


def irregular(run):  # type: ignore[no-untyped-def]
    return type("Irregular", (Stack,), {"run": run})()


def test_scale_chosen_by_number_outside_of_the_layer(traced: list[int]) -> None:
    def run(self: Stack, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, 0.5 if number == 5 else 1.0)
        return x

    assert both(irregular(run), traced) == (True, 0)


def test_parent_changes_what_one_layer_gets(traced: list[int]) -> None:
    def run(self: Stack, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x * 2 if number == 4 else x)
        return x

    assert both(irregular(run), traced)[0]


def test_layer_that_uses_its_number(traced: list[int]) -> None:
    net = Stack()
    for layer in net.layers:
        layer.forward = lambda x, own=layer: x + own.linear(x) / (own.number + 1)  # type: ignore[method-assign]
    assert both(net, traced)[0]

    class Scaled(Layer):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x + self.linear(x) / (self.number + 1)

    net.layers = nn.ModuleList([Scaled(8, number) for number in range(7)])
    traced.clear()
    equal, traces = both(net, traced)
    assert equal
    assert traces == 2, "the prefix was to be traced, found irregular, and the whole traced"


def test_outputs_of_all_layers_are_used(traced: list[int]) -> None:
    def run(self: Stack, x: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return torch.stack(seen).mean(0)

    assert both(irregular(run), traced)[0]


def test_one_shared_layer(traced: list[int]) -> None:
    net = Stack()
    for layer in net.layers[1:]:
        layer.linear.weight = net.layers[0].linear.weight
    equal, _ = both(net, traced)
    assert equal
    graph = capture(net, {"x": torch.randn(3, 8), "y": torch.randn(3, 8)}, roles={"y": "labels"}).graph
    (shared,) = [weight for weight in graph.weights if weight.key.endswith("linear.weight")]
    assert len(shared.aliases) == 6


def test_hooks_are_respected(traced: list[int]) -> None:
    net = Stack()
    net.layers[5].register_forward_hook(lambda module, args, output: output * 3)
    assert both(net, traced) == (True, 0)


def test_alternating_layers(traced: list[int]) -> None:
    net = Stack(12)
    for number, layer in enumerate(net.layers):
        if number % 3 == 2:
            layer.norm = nn.Identity()
    assert both(net, traced) == (True, 1)


class Counting(nn.Module):
    """Layers whose list is long enough, beside numbers that forward counts up in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.seen.add_(1)
        hidden = self.norm(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return functional.cross_entropy(hidden, labels)


def test_a_capture_changes_no_buffer(traced: list[int]) -> None:
    """The first run finds out how layers are called. It went over the real buffers, and counted one batch too many."""
    net = Counting()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    held = dict(net.named_buffers())
    example = {"x": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 3])}
    graph = capture(net, example).graph
    assert min(traced) < len(list(net.modules()))
    assert {"norm.num_batches_tracked", "seen"} <= {weight.key for weight in graph.weights}
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(tensor is held[name] for name, tensor in net.named_buffers())
