"""Any module with a loss can be captured: convolutions, own losses, tied weights, writes in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from eager_reference import assert_same_training_step
from torch import Tensor, nn
from torch.nn import functional

from fusionai.errors import GraphError
from fusionai.graph.capture import capture
from fusionai.graph.verify import verify

torch.set_num_threads(1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels * stride, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels * stride)
        self.second = nn.Conv2d(channels * stride, channels * stride, 3, 1, 1)
        self.skip = nn.Conv2d(channels, channels * stride, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.norm(self.first(x)))) + self.skip(x))


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(ResidualBlock(8, 1), ResidualBlock(8, 2), ResidualBlock(16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = functional.adaptive_avg_pool2d(self.blocks(functional.max_pool2d(self.stem(images), 2)), 1)
        scores = self.head(features.flatten(1))
        return {"loss": functional.cross_entropy(scores, labels), "scores": scores}


def images(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "images": torch.randn(rows, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 5, (rows,), generator=generator),
    }


def test_convolutions_with_batch_norm() -> None:
    torch.manual_seed(0)
    net = ResidualNet()
    captured = capture(net, images(2))
    verify(captured.graph)
    buffers = {weight.key for weight in captured.graph.weights if weight.kind == "buffer"}
    assert {"stem.1.running_mean", "stem.1.num_batches_tracked", "blocks.2.norm.running_var"} <= buffers
    # Capture itself must not have counted a batch.
    assert int(net.stem[1].num_batches_tracked) == 0
    for rows in (5, 3):
        eager = copy.deepcopy(net)
        expected = eager(**images(rows))["loss"]
        assert_same_training_step(captured, eager, images(rows), expected)


def test_own_loss_of_a_plain_module() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    example = {"input": torch.randn(4, 6), "target": torch.randint(0, 3, (4,))}
    captured = capture(net, example, loss=functional.cross_entropy, roles={"target": "labels"})
    assert [(item.name, item.role) for item in captured.graph.inputs] == [("input", "data"), ("target", "labels")]
    inputs = {"input": torch.randn(9, 6), "target": torch.randint(0, 3, (9,))}
    expected = functional.cross_entropy(net(inputs["input"]), inputs["target"])
    assert_same_training_step(captured, net, inputs, expected)


class Regression(nn.Module):
    """A module whose middle the tests choose."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.middle(self.linear(x)), y)

    def middle(self, x: Tensor) -> Tensor:
        return x


def regression_batch(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 6), "y": torch.randn(rows, 6)}


def check(net: nn.Module, rows: int = 5) -> None:
    captured = capture(net, regression_batch(4), roles={"y": "labels"})
    inputs = regression_batch(rows)
    eager = copy.deepcopy(net)
    assert_same_training_step(captured, eager, inputs, eager(**inputs))


def test_writes_in_place_become_new_values() -> None:
    class Writing(Regression):
        def middle(self, x: Tensor) -> Tensor:
            x = x * 2
            x += 1
            x.mul_(torch.sigmoid(x))
            return functional.relu(x, inplace=True) - x

    check(Writing())


def test_gradients_stop_where_the_module_stops_them() -> None:
    class Stopping(Regression):
        def middle(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = self.linear(x).exp()
            return x * scale + x.detach()

    check(Stopping())


def test_tied_and_frozen_weights() -> None:
    class Tied(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(6, 6, bias=False)
            self.again.weight = self.linear.weight
            self.linear.bias.requires_grad_(False)

        def middle(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(x))

    net = Tied()
    check(net)
    graph = capture(net, regression_batch(4), roles={"y": "labels"}).graph
    assert [(weight.key, weight.trainable, weight.aliases) for weight in graph.weights] == [
        ("linear.weight", True, ("again.weight",)),
        ("linear.bias", False, ()),
    ]


def test_buffers_and_constants() -> None:
    class Held(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.arange(6.0))
            self.register_buffer("derived", torch.arange(6.0) + 1, persistent=False)
            self.register_buffer("calls", torch.zeros(()))

        def middle(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * self.kept + self.derived * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    net = Held()
    check(net)
    captured = capture(net, regression_batch(4), roles={"y": "labels"})
    kinds = {weight.key.split(".")[0]: weight.kind for weight in captured.graph.weights}
    assert kinds["kept"] == kinds["calls"] == "buffer"
    assert kinds["derived"] == kinds["constant"] == "constant"
    assert float(net.calls) == 0


def test_sizes_are_expressions() -> None:
    class Sized(Regression):
        def middle(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            doubled = torch.cat([x, x]).view(batch, 12)
            return doubled.reshape(batch * 3, 4).sum() / (2 * batch) + torch.zeros(batch, 6)

    check(Sized())


def test_one_tensor_as_two_inputs() -> None:
    same = torch.randn(4, 6)
    captured = capture(Regression(), {"x": same, "y": same}, roles={"y": "labels"})
    assert [item.name for item in captured.graph.inputs] == ["x", "y"]


def test_dynamic_axes_of_choice() -> None:
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return (x.mean(dim=2) * self.scale).pow(2).sum()

    net = Means()
    graph = capture(net, {"x": torch.randn(2, 3, 4)}, dynamic={"x": {0: "batch", 2: "frames"}}).graph
    assert graph.inputs[0].type.shape == ("s0", 3, "s1")
    assert capture(net, {"x": torch.randn(2, 3, 4)}).graph.inputs[0].type.shape == ("s0", 3, 4)


def test_dropout_draws_the_same_numbers() -> None:
    class Dropping(Regression):
        def middle(self, x: Tensor) -> Tensor:
            return functional.dropout(x, 0.4, self.training)

    ops = [node.op for node in capture(Dropping(), regression_batch(4), roles={"y": "labels"}).graph.nodes]
    assert "aten.dropout.default" in ops


# --- what cannot be captured ------------------------------------------------------------------------------------


def refused(net: nn.Module, **options: object) -> str:
    options = {"roles": {"y": "labels"}, **options}
    with pytest.raises(GraphError) as error:
        capture(net, regression_batch(4), **options)  # type: ignore[arg-type]
    text = str(error.value)
    assert "Traceback" not in text
    assert len(text) < 700
    return text


def with_middle(function: Callable[[Regression, Tensor], Tensor]) -> Regression:
    return type("Model", (Regression,), {"middle": function})()


def test_unknown_operator_is_named() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_exp(x.T @ x)

    net = Regression()
    net.add_module("odd", Inner())
    net.middle = lambda x: x @ net.odd(x)  # type: ignore[method-assign]
    text = refused(net)
    assert "aten.linalg_matrix_exp.default" in text
    assert "'odd'" in text
    assert "docs/add-an-operator.md" in text


def test_control_flow_on_data(capfd: pytest.CaptureFixture[str]) -> None:
    text = refused(with_middle(lambda self, x: x if x.sum() > 0 else -x))
    assert "depends on the values" in text
    assert "test_capture_modules.py" in text
    assert capfd.readouterr() == ("", "")


def test_shapes_from_data() -> None:
    assert "depends on the values" in refused(with_middle(lambda self, x: x + x[x > 0].sum()))
    assert "depends on the values" in refused(with_middle(lambda self, x: x * x.max().item()))


def test_no_loss() -> None:
    with pytest.raises(GraphError, match="must be one floating-point number"):
        capture(nn.Linear(6, 6), {"input": torch.randn(3, 6)})

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": x}

    with pytest.raises(GraphError, match="returned no loss but dict"):
        capture(Nothing(), {"x": torch.randn(3, 6)})


@pytest.mark.parametrize(
    "middle",
    [
        lambda self, x: x if x.shape[0] == 4 else -x,
        lambda self, x: x * int(x.shape[0]) if isinstance(x.shape[0], int) else x[: int(x.shape[0])],
        lambda self, x: x * float(len(x)),
    ],
    ids=["branch", "int", "len"],
)
def test_specialised_axis_is_named(middle: Callable[[Regression, Tensor], Tensor]) -> None:
    net = with_middle(middle)
    with pytest.raises(GraphError) as error:
        capture(net, regression_batch(4), roles={"y": "labels"})
    assert "axis 0 (batch) of input 'x'" in str(error.value)


def test_state_between_calls_is_found() -> None:
    calls = [0]

    def counting(self: Regression, x: Tensor) -> Tensor:
        calls[0] += 1
        return x * calls[0]

    assert "computes the loss" in refused(with_middle(counting))


def test_writing_where_another_view_reads() -> None:
    def aliased(self: Regression, x: Tensor) -> Tensor:
        x = x * 2
        column = x[:, 0]
        x.mul_(2)
        return x + column[:, None]

    assert "writes in place" in refused(with_middle(aliased))


def test_own_autocast_and_own_errors() -> None:
    def lowered(self: Regression, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x).float()

    assert "autocast" in refused(with_middle(lowered))

    def failing(self: Regression, x: Tensor) -> Tensor:
        raise ValueError("this is mine")

    text = refused(with_middle(failing))
    assert "this is mine" in text
    assert "in failing" in text


def test_descriptions_must_fit_the_example() -> None:
    assert "roles names z" in refused(Regression(), roles={"z": "labels"})
    assert "dynamic axis 5" in refused(Regression(), dynamic={"x": {5: "far"}})
    assert "no input has the role 'labels'" in refused(Regression(), roles={}, loss=functional.mse_loss)


def test_reading_weights() -> None:
    captured = capture(Regression(), regression_batch(4), roles={"y": "labels"})
    assert captured.read("linear.bias").shape == (6,)
    with pytest.raises(GraphError, match="no weight 'other'"):
        captured.read("other")
    empty = capture(Regression().to("meta"), regression_batch(4), roles={"y": "labels"})
    with pytest.raises(GraphError, match="on the meta device"):
        empty.read("linear.bias")
