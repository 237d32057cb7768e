"""What leaves no operator in a trace is refused with its name and place: it would be trained without, and silently."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fusionai.errors import GraphError
from fusionai.graph.capture import capture

EXAMPLE = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), "labels": torch.tensor([0, 1, 2, 0])}


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor] = lambda net, h: h) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(self.between(self, torch.tanh(self.first(x)))), labels)


class Reversed(torch.autograd.Function):
    """The identity, with the gradient turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def operators(net: Net) -> list[str]:
    return [node.op for node in capture(net, EXAMPLE).graph.nodes]


def test_own_backward() -> None:
    with pytest.raises(GraphError, match=r"Net uses Reversed \(test_unseen.py:\d+, in <lambda>\), a torch.autograd"):
        operators(Net(lambda net, h: Reversed.apply(h)))


def test_own_backward_where_no_gradient_passes() -> None:
    def between(net: Net, h: Tensor) -> Tensor:
        with torch.no_grad():
            aside = Reversed.apply(h)
        return h + aside

    assert "aten.detach.default" in operators(Net(between))


def test_the_way_out_has_the_gradient_of_the_own_backward() -> None:
    """The text says how to write a value with another gradient: of f(x) = x and g(x) = -x the gradient is -1."""
    x = torch.tensor([0.5, -2.0], requires_grad=True)
    written = -x + (x - -x).detach()
    assert written.tolist() == x.tolist()
    [gradient] = torch.autograd.grad(written.sum(), x)
    assert gradient.tolist() == [-1.0, -1.0]


def test_hooks_on_gradients() -> None:
    def doubled(gradient: Tensor) -> Tensor:
        return 2 * gradient

    def between(net: Net, h: Tensor) -> Tensor:
        h.register_hook(doubled)
        return h

    with pytest.raises(GraphError, match=r"Net puts a hook on a gradient \(test_unseen.py:\d+, in between\)"):
        operators(Net(between))
    net = Net()
    handle = net.last.weight.register_hook(doubled)
    with pytest.raises(GraphError, match=r"the gradient of 'last.weight' has a hook"):
        operators(net)
    handle.remove()
    net.first.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(GraphError, match=r"the gradient of 'first.bias' has a hook"):
        operators(net)


def test_hooks_on_modules() -> None:
    net = Net()
    plain = operators(net)
    handle = net.last.register_full_backward_hook(lambda module, before, after: before)
    with pytest.raises(GraphError, match=r"module 'last' has a backward hook"):
        operators(net)
    handle.remove()
    handle = net.register_full_backward_pre_hook(lambda module, after: after)
    with pytest.raises(GraphError, match=r"the model itself has a backward hook"):
        operators(net)
    handle.remove()
    # Hooks of forward are part of forward.
    net.last.register_forward_hook(lambda module, given, out: out * 2)
    assert operators(net) == [*plain[:-1], "aten.mul.Tensor", plain[-1]]


def test_inference_mode() -> None:
    def between(net: Net, h: Tensor) -> Tensor:
        with torch.inference_mode():
            aside = net.first(h)
        return h + aside

    with pytest.raises(GraphError, match=r"enters torch.inference_mode \(test_unseen.py:\d+, in between\)"):
        operators(Net(between))

    @torch.inference_mode()
    def decorated(net: Net, h: Tensor) -> Tensor:
        return net.first(h)

    with pytest.raises(GraphError, match=r"enters torch.inference_mode"):
        operators(Net(lambda net, h: h + decorated(net, h)))


def test_checkpoints() -> None:
    def between(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
        return lambda net, h: torch.utils.checkpoint.checkpoint(net.first, h, use_reentrant=reentrant)

    assert operators(Net(between(False))).count("aten.linear.default") == 3
    with pytest.raises(GraphError, match=r"use_reentrant=True.*pass use_reentrant=False"):
        operators(Net(between(True)))


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())], ids=["random", "numpy"])
def test_numbers_from_other_generators(draw: Callable[[], float]) -> None:
    with pytest.raises(GraphError, match="Net draws numbers from Python's random or numpy's random"):
        operators(Net(lambda net, h: h * draw()))


def shared(change: Callable[[Net], None]) -> str:
    """Return why a net is refused after a change."""
    net = Net()
    change(net)
    with pytest.raises(GraphError, match="so training changes both") as refused:
        operators(net)
    return str(refused.value).partition(", so training")[0]


def test_memory_that_two_tensors_share() -> None:
    def by_data(net: Net) -> None:
        net.add_module("other", nn.Linear(4, 4))
        net.other.weight.data = net.first.weight.data  # type: ignore[union-attr, assignment]

    def transposed(net: Net) -> None:
        net.register_parameter("turned", nn.Parameter(net.first.weight.data.t()))

    def buffer(net: Net) -> None:
        net.register_buffer("row", net.last.weight.detach()[1])

    def attribute(net: Net) -> None:
        net.kept = net.last.bias.detach()  # type: ignore[assignment]

    assert shared(by_data) == "'other.weight' lies in the memory of the parameter 'first.weight'"
    assert "memory of the parameter" in shared(transposed)
    assert shared(buffer) == "'row' lies in the memory of the parameter 'last.weight'"
    assert shared(attribute) == "'kept' lies in the memory of the parameter 'last.bias'"


def test_memory_that_is_shared_without_harm() -> None:
    net = Net()
    net.again = net.first  # one parameter under two names
    flat = torch.zeros(8)
    net.one, net.two = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])  # parts of one storage
    net.register_buffer("table", flat.clone())
    net.register_buffer("part", net.table[:4])  # never trained
    net.last.weight.requires_grad_(False)
    net.register_buffer("frozen", net.last.weight.detach())
    assert operators(net)


def test_nothing_stays_changed() -> None:
    before = (torch.autograd.Function.__dict__["apply"], Tensor.register_hook, torch.inference_mode.__enter__)
    with pytest.raises(GraphError):
        operators(Net(lambda net, h: Reversed.apply(h)))
    assert before == (torch.autograd.Function.__dict__["apply"], Tensor.register_hook, torch.inference_mode.__enter__)
    x = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(Reversed.apply(x), x)[0].item() == -1


def test_a_mean_of_nothing_at_the_second_size() -> None:
    """No label counts in the rows that are left there: graph and module agree that the loss is not a number."""
    labels = torch.tensor([0, -100, -100, -100])
    assert capture(Net(), {"x": EXAMPLE["x"], "labels": labels}).graph.nodes


def test_weights_outside_of_the_module() -> None:
    """They would become constants: torch trains them where they are given to the optimizer, and here nothing would."""
    scale, frozen = torch.full((4,), 2.0, requires_grad=True), torch.full((4,), 2.0)
    outside = nn.Linear(4, 4)
    for between in (lambda net, h: h * scale, lambda net, h: outside(h), lambda net, h: h * nn.Parameter(frozen)):
        with pytest.raises(GraphError, match="requires a gradient and is none of its parameters"):
            operators(Net(between))
    assert operators(Net(lambda net, h: h * frozen + scale.detach()))


def test_a_loss_with_weights_of_its_own() -> None:
    class Balanced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output * self.scale, labels)

    loss = Balanced()
    example = {"input": EXAMPLE["x"], "labels": EXAMPLE["labels"]}
    for given in (loss, lambda output, labels: loss(output, labels)):
        with pytest.raises(GraphError, match="a loss with weights of its own, for example"):
            capture(nn.Linear(4, 3), example, loss=given)
    loss.requires_grad_(False)
    assert capture(nn.Linear(4, 3), example, loss=loss).graph.nodes


def test_a_parameter_that_forward_freezes() -> None:
    def between(net: Net, h: Tensor) -> Tensor:
        net.last.requires_grad_(False)
        return h

    def by_attribute(net: Net, h: Tensor) -> Tensor:
        net.last.weight.requires_grad = False
        return h

    for freezing in (between, by_attribute):
        with pytest.raises(GraphError, match="freezes a parameter while it computes"):
            operators(Net(freezing))
