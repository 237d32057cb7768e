"""State that forward changes: in buffers it goes on from call to call as in torch, elsewhere it is refused by name."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager_reference import graph_weights
from torch import Tensor, nn
from torch.nn import functional

from fusionai.errors import GraphError
from fusionai.graph.capture import Captured, capture
from fusionai.graph.capture.interpreter import interpret
from fusionai.graph.model import WeightKey

torch.set_num_threads(1)

CALLS = 3


class Net(nn.Module):
    """Two linear layers, and state between them that the tests use in every way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.ones(6))
        self.register_buffer("other", torch.full((6,), 2.0), persistent=False)
        self.register_buffer("empty", None)
        self.norm, self.average = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)
        self.number, self.items, self.table = 0, [], {}
        self.stash: Tensor | None = None
        self.plain = torch.zeros(())
        self.helper = types.SimpleNamespace(total=0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.last(self.middle(self.first(x))), y)

    def middle(self, x: Tensor) -> Tensor:
        return x


Middle = Callable[[Any, Tensor], Tensor]


def net(middle: Middle) -> Net:
    return type("Net", (Net,), {"middle": middle})()


def batch(number: int, rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(rows, 6, generator=generator), "y": torch.randn(rows, 6, generator=generator)}


def captured(module: nn.Module) -> Captured:
    return capture(module, batch(0, 4), roles={"y": "labels"})


def assert_same_calls(module: nn.Module, reference: nn.Module) -> None:
    """Call the graph of a module and an equal module several times; compare losses, gradients and buffers."""
    found = captured(module)
    weights = graph_weights(found)
    named = {weight.name: weights[weight.key] for weight in found.graph.weights}
    for number in range(CALLS):
        loss, expected = interpret(found.graph, batch(number), named), reference(**batch(number))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
    for name, tensor in (*reference.named_parameters(), *reference.named_buffers()):
        mine = weights.get(WeightKey(name))
        if mine is not None:
            want, got = (tensor.grad, mine.grad) if mine.requires_grad else (tensor, mine)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


# --- buffers ------------------------------------------------------------------------------------------------------


def assigned(self: Net, x: Tensor) -> Tensor:
    self.seen = self.seen + 1
    return x * self.seen


def old_and_new(self: Net, x: Tensor) -> Tensor:
    scaled = x * (self.seen + 1)
    self.seen = self.seen + 1
    return scaled + self.seen * x


def assigned_twice(self: Net, x: Tensor) -> Tensor:
    return assigned(self, assigned(self, x))


def in_place(self: Net, x: Tensor) -> Tensor:
    shifted = x + self.seen
    self.seen += 1
    return shifted * 2 + self.seen


def whole_numbers(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return x / self.count


def without_gradients(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
    return x - self.mean


def detached(self: Net, x: Tensor) -> Tensor:
    self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
    return x - self.mean


def by_an_operator_without_in_place_form(self: Net, x: Tensor) -> Tensor:
    self.mean.lerp_(x.detach().mean(0), 0.1)
    return x - self.mean


def filled(self: Net, x: Tensor) -> Tensor:
    self.seen.fill_(3.0)
    self.other.zero_()
    return x * self.seen + self.other


def copied(self: Net, x: Tensor) -> Tensor:
    shifted = x - self.mean.detach().clone()
    self.mean.copy_(x.detach().mean(0))
    return shifted - self.mean


def never_read(self: Net, x: Tensor) -> Tensor:
    self.mean = self.mean + x.mean(0)  # carries a gradient that nothing uses
    return x


def swapped(self: Net, x: Tensor) -> Tensor:
    self.mean, self.other = self.other * 2, self.mean.clone()
    return x * self.mean - self.other


def handed_on(self: Net, x: Tensor) -> Tensor:
    self.other = self.mean
    self.mean = x.detach().mean(0)
    return x * self.other


def through_an_earlier_view(self: Net, x: Tensor) -> Tensor:
    part = self.mean[:3]
    self.mean.add_(1)
    return x * part.detach().sum()


def normalised_twice(self: Net, x: Tensor) -> Tensor:
    return self.norm(self.norm(x))


def statistics_taken_over(self: Net, x: Tensor) -> Tensor:
    self.other.copy_(self.norm.running_mean)
    x = self.norm(x)
    self.mean.copy_(self.norm.running_mean)
    return x * self.mean - self.other


def counted_by_size(self: Net, x: Tensor) -> Tensor:
    self.count += x.shape[0]
    return x / self.count


def first_in_first_out(self: Net, x: Tensor) -> Tensor:
    self.mean = torch.cat([self.mean[1:], x.detach().mean()[None]])
    return x * self.mean


def set_before_read(self: Net, x: Tensor) -> Tensor:
    self.stash, self.items = x.mean(), []
    self.items.append(x)
    return x + self.stash + len(self.items)


@pytest.mark.parametrize(
    "middle",
    [
        assigned,
        old_and_new,
        assigned_twice,
        in_place,
        whole_numbers,
        without_gradients,
        detached,
        by_an_operator_without_in_place_form,
        filled,
        copied,
        never_read,
        swapped,
        handed_on,
        through_an_earlier_view,
        normalised_twice,
        statistics_taken_over,
        counted_by_size,
        first_in_first_out,
        set_before_read,
    ],
)
def test_state_goes_on_as_in_torch(middle: Middle) -> None:
    module = net(middle)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    assert_same_calls(module, net(middle))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_buffers()), "capture changed it"
    assert (module.number, module.items, module.table, module.stash) == (0, [], {}, None)


def test_a_buffer_is_stored_once_and_only_where_it_is_read() -> None:
    def operators(middle: Middle) -> list[str]:
        return [node.op for node in captured(net(middle)).graph.nodes if node.op.split(".")[1] in _WRITING]

    assert operators(assigned_twice) == ["aten.clone.default", "aten.copy_.default"]
    # A count of batches that nothing reads stays a write in place.
    assert operators(lambda self, x: self.norm(x)) == ["aten.add_.Tensor"]
    assert operators(lambda self, x: x) == []


_WRITING = ("clone", "copy_", "add_", "mul_")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x)) + self.calls
        self.count()
        return x * self.calls.sqrt()

    def count(self) -> None:
        self.calls += 1


class AssigningLayer(Layer):
    def count(self) -> None:
        self.calls = self.calls + 1


class Stack(nn.Module):
    def __init__(self, kind: type[Layer], shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([kind() for _ in range(7)])
        self.shared = shared

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = torch.ones(6)
        for layer in self.layers:
            x = layer(x)
            if self.shared:  # what is stored is made outside of the layers
                layer.calls = mask.sum()
        return functional.mse_loss(x, y)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [Layer, AssigningLayer])
def test_repeated_layers(kind: type[Layer], shared: bool) -> None:
    assert_same_calls(Stack(kind, shared), Stack(kind, shared))
    short, full = (
        capture(Stack(kind, shared), batch(0, 4), roles={"y": "labels"}, repeats=repeats, validate_values=False).graph
        for repeats in (True, False)
    )
    assert short == full


def test_weights_of_layers_used_outside_of_them() -> None:
    class Penalised(Stack):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) + sum(layer.linear.weight.square().sum() for layer in self.layers)

    short, full = (
        capture(Penalised(Layer, False), batch(0, 4), roles={"y": "labels"}, repeats=each, validate_values=False).graph
        for each in (True, False)
    )
    assert short == full


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(module: nn.Module) -> str:
    with pytest.raises(GraphError) as error:
        captured(module)
    assert len(str(error.value)) < 700
    return str(error.value)


def number(self: Net, x: Tensor) -> Tensor:
    self.number += 1
    return x * self.number


def number_that_nothing_reads(self: Net, x: Tensor) -> Tensor:
    self.number += 1
    return x


def number_past_the_attribute(self: Net, x: Tensor) -> Tensor:
    self.__dict__["number"] += 1
    return x * self.number


def item(self: Net, x: Tensor) -> Tensor:
    self.items.append(1)
    return x * len(self.items)


def entry(self: Net, x: Tensor) -> Tensor:
    self.table["a"] = self.table.get("a", 0) + 1
    return x * self.table["a"]


def helper(self: Net, x: Tensor) -> Tensor:
    self.helper.total += 1
    return x * self.helper.total


def tensor(self: Net, x: Tensor) -> Tensor:
    self.plain = self.plain + 1
    return x * self.plain


def read_before_set(self: Net, x: Tensor) -> Tensor:
    shifted = x if self.stash is None else x + 1
    self.stash = x.mean()
    return shifted


def gradient_across_calls(self: Net, x: Tensor) -> Tensor:
    self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
    return x - self.mean


def gradient_across_calls_in_place(self: Net, x: Tensor) -> Tensor:
    self.mean.mul_(0.9).add_(0.1 * x.mean(0))
    return x - self.mean


def part(self: Net, x: Tensor) -> Tensor:
    self.mean[0] = 1.0
    return x * self.mean


def first_tensor(self: Net, x: Tensor) -> Tensor:
    self.empty = torch.ones(6) if self.empty is None else self.empty + 1
    return x * self.empty


def late_buffer(self: Net, x: Tensor) -> Tensor:
    if not hasattr(self, "late"):
        self.register_buffer("late", torch.zeros(6))
    self.late = self.late + 1
    return x * self.late


def other_dtype(self: Net, x: Tensor) -> Tensor:
    self.seen = self.seen.double() + 1
    return x * self.seen.float()


def other_shape(self: Net, x: Tensor) -> Tensor:
    self.mean = x.detach().mean(1)
    return x


def second_name(self: Net, x: Tensor) -> Tensor:
    self.other = self.mean
    self.mean.add_(1)
    return x * self.other


def one_tensor_for_two(self: Net, x: Tensor) -> Tensor:
    self.other = self.mean = x.detach().mean(0)
    return x * self.other


def buffer_memory(self: Net, x: Tensor) -> Tensor:
    self.mean.data = self.mean.data * 0.9
    return x * self.mean


def parameter_memory(self: Net, x: Tensor) -> Tensor:
    self.first.weight.data = self.first.weight.data * 0.9
    return x


def parameter_in_place(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.first.weight.mul_(0.9)
    return x


def parameter_data_in_place(self: Net, x: Tensor) -> Tensor:
    self.first.weight.data.mul_(0.9)
    return x


def other_parameter(self: Net, x: Tensor) -> Tensor:
    self.first.weight = nn.Parameter(self.first.weight * 0.9)
    return x


def new_submodule(self: Net, x: Tensor) -> Tensor:
    self.late = nn.Identity()
    return x


def unregistered_in_place(self: Net, x: Tensor) -> Tensor:
    self.plain.add_(1)
    return x * self.plain


def average_of_all_batches(self: Net, x: Tensor) -> Tensor:
    return self.average(x)


def drawn(self: Net, x: Tensor) -> Tensor:
    return x * random.random()


@pytest.mark.parametrize(
    ("middle", "named"),
    [
        (number, "'number'"),
        (number_that_nothing_reads, "'number'"),
        (number_past_the_attribute, "'number'"),
        (item, "'items[0]'"),
        (entry, "table['a']"),
        (helper, "'helper.total'"),
        (tensor, "'plain'"),
        (read_before_set, "'stash'"),
        (gradient_across_calls, "buffer 'mean' is given a value that carries a gradient"),
        (gradient_across_calls_in_place, "buffer 'mean' is given a value that carries a gradient"),
        (part, "a part of the buffer 'mean'"),
        (first_tensor, "the buffer 'empty' its first tensor"),
        (late_buffer, "the buffer 'late' its first tensor"),
        (other_dtype, "the buffer 'seen', torch.float32"),
        (other_shape, "the buffer 'mean', torch.float32"),
        (second_name, "the tensor of 'mean' to the buffer 'other'"),
        (one_tensor_for_two, "one tensor to the buffers"),
        (buffer_memory, "the memory of 'mean'"),
        (parameter_memory, "the memory of 'first.weight'"),
        (parameter_in_place, "the parameter 'first.weight'"),
        (parameter_data_in_place, ".data"),
        (other_parameter, "the parameter 'first.weight' another tensor"),
        (new_submodule, "submodule 'late'"),
        (unregistered_in_place, "register it as a buffer"),
        (average_of_all_batches, "depends on the values in a tensor"),
        (drawn, "draws numbers from Python's random"),
    ],
)
def test_state_that_is_refused(middle: Middle, named: str) -> None:
    assert named in refused(net(middle))


def test_a_shared_buffer_is_refused_when_one_name_gets_another_tensor() -> None:
    module = net(assigned)
    module.register_buffer("twin", module.seen)
    assert "'twin' shares" in refused(module)
    shared = net(in_place)
    shared.register_buffer("twin", shared.seen)
    reference = net(in_place)
    reference.register_buffer("twin", reference.seen)
    assert_same_calls(shared, reference)


def test_a_hook_that_keeps_state_is_refused_and_another_is_respected() -> None:
    counting, calls = net(assigned), [0]

    def count(module: nn.Module, args: object, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * calls[0]

    counting.first.register_forward_hook(count)
    assert "state kept between calls" in refused(counting)
    doubling, reference = net(assigned), net(assigned)
    for each in (doubling, reference):
        each.last.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        each.first.register_forward_hook(lambda module, args, output: output + 1)
    assert_same_calls(doubling, reference)


def test_a_flag_that_each_call_turns_is_found_by_the_second_call() -> None:
    flags = [False, False]

    def turning(self: Net, x: Tensor) -> Tensor:
        # Equal in the trace and at the next call, different at the one after it.
        flags.append(flags[-1] ^ flags[-2])
        return x * (2.0 if len(flags) % 2 else 2.0 + flags.__len__() % 3)

    text = refused(net(turning))
    assert "the module itself" in text


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrised_weights_are_refused_by_name(kind: str) -> None:
    module = net(assigned)
    module.last = getattr(nn.utils.parametrizations, kind)(nn.Linear(6, 6))
    assert "module 'last.parametrizations.weight.0' uses an operator" in refused(module)


def test_layers_without_shape_are_refused() -> None:
    module = net(assigned)
    module.last = nn.LazyLinear(6)
    assert "'last.weight' of Net has no shape yet" in refused(module)
