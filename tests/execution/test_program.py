"""A program's contract on every plane: errors, determinism, memory, and the corners of its boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same, assert_same_losses
from small_graphs import (
    GraphMaker,
    Pipeline,
    cut,
    data,
    language_model_graph,
    language_model_weights,
    load_weights,
    tensor,
    token_batch,
)
from torch import nn

from fusionai.errors import ConfigError, FusionError, GraphError, JobError
from fusionai.execution.plane import OptimizerConfig, Plane, ProgramOptions
from fusionai.execution.planes import plane
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.graph.model import Node, Ref, SubDag, TensorType, Transfer, ValueName
from fusionai.tensor import TensorData

torch.set_num_threads(1)

SIZES = {"s0": 2, "s1": 8}
KEY = MicrobatchKey(0, 0)


def language_model(
    plane: Plane, positions: list[int], options: ProgramOptions | None = None, **settings: Any
) -> tuple[list[SubDag], RoundProgram]:
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights, **settings), positions)
    program = plane.load(subdags, options or ProgramOptions())
    load_weights(program, weights)
    return subdags, program


def inputs(stage: SubDag, batch: dict[str, torch.Tensor]) -> dict[ValueName, TensorData]:
    return {item.name: data(batch[item.name]) for item in stage.inputs if item.role != "positions"}


# --- errors --------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(any_plane: Plane) -> None:
    weights = language_model_weights()
    first, second = cut(language_model_graph(weights), [12])
    program = any_plane.load([first, second], ProgramOptions())
    with pytest.raises(GraphError, match=r"'nothing' is not held here; held: .*embedding"):
        program.load("nothing", data(torch.ones(1)))
    with pytest.raises(GraphError, match=r"float32 of shape \[31, 16\], but got float32 of shape \[16, 31\]"):
        program.load("embedding", data(torch.ones(16, 31)))
    with pytest.raises(GraphError, match=r"but got float64"):
        program.load("embedding", data(torch.ones(31, 16, dtype=torch.float64)))
    with pytest.raises(JobError, match="weights of this program are not loaded"):
        program.forward(0, KEY, SIZES, inputs(first, token_batch(0, 0)))
    with pytest.raises(GraphError, match="not loaded yet"):
        program.read("embedding")
    load_weights(program, weights)
    assert program.missing() == ()
    with pytest.raises(GraphError, match=r"no optimizer state 'momentum_buffer'; it has: exp_avg, exp_avg_sq"):
        program.read("embedding", "momentum_buffer")
    with pytest.raises(GraphError, match="takes no value 'more'"):
        program.forward(0, KEY, SIZES, {**inputs(first, token_batch(0, 0)), "more": data(torch.ones(1))})
    with pytest.raises(GraphError, match="needs the value 'ids'"):
        program.forward(0, KEY, SIZES, {})
    with pytest.raises(GraphError, match=r"'ids' must be int64 of shape \[2, 8\], but is int64 of shape \[2, 7\]"):
        program.forward(0, KEY, SIZES, {"ids": data(torch.ones(2, 7, dtype=torch.int64))})
    with pytest.raises(GraphError, match="but is int32"):
        program.forward(0, KEY, SIZES, {"ids": data(torch.ones(2, 8, dtype=torch.int32))})
    with pytest.raises(GraphError, match="s1"):
        program.forward(0, KEY, {"s0": 2}, inputs(first, token_batch(0, 0)))
    with pytest.raises(GraphError, match="stage 7 is not part of this program"):
        program.forward(7, KEY, SIZES, {})
    with pytest.raises(JobError, match="did not go forward"):
        program.backward(0, KEY, {})
    sent = program.forward(0, KEY, SIZES, inputs(first, token_batch(0, 0)))
    with pytest.raises(JobError, match="has gone forward already"):
        program.forward(0, KEY, SIZES, inputs(first, token_batch(0, 0)))
    value = next(item.value for item in first.sends if item.gradient)
    with pytest.raises(GraphError, match="needs 1 gradients"):
        program.backward(0, KEY, {})
    wrong = {name: [data(torch.ones(1))] for name in sent}
    with pytest.raises(GraphError, match=r"gradient of .* must be .* of shape"):
        program.backward(0, KEY, wrong)
    with pytest.raises(GraphError, match="sent no value 'ids'"):
        program.backward(0, KEY, {"ids": [data(torch.ones(2, 8))]})
    assert value in program.forward(0, MicrobatchKey(0, 1), SIZES, inputs(first, token_batch(0, 0)))
    program.close()
    with pytest.raises(JobError, match="closed"):
        program.forward(0, KEY, SIZES, inputs(first, token_batch(0, 0)))


def test_fp32_refuses_a_received_bf16_tensor(any_plane: Plane) -> None:
    subdags, program = language_model(any_plane, [12])
    program.forward(0, KEY, SIZES, inputs(subdags[0], token_batch(0, 0)))
    given = inputs(subdags[1], token_batch(0, 0))
    for item in subdags[1].receives:
        given[item.value] = data(torch.ones([SIZES.get(str(dim), dim) for dim in item.type.shape]).bfloat16())
    with pytest.raises(GraphError, match="but is bfloat16"):
        program.forward(1, KEY, SIZES, given)


def test_unknown_device_operator_and_plane(any_plane: Plane) -> None:
    (whole,) = cut(language_model_graph(language_model_weights()), [])
    with pytest.raises(ConfigError, match=r"'cuda:99' is not usable here; usable: .*cpu"):
        any_plane.load([whole], ProgramOptions(device="cuda:99"))
    bad = Node("bad", "aten.from_file.default", ("/etc/passwd",), {}, (ValueName("bad"),))
    evil = SubDag(0, {}, (), (), (bad,), {ValueName("bad"): TensorType("uint8", (1,))}, (), (), None)
    abilities = any_plane.abilities("cpu")
    assert abilities.lacking(evil) == ("aten.from_file.default",)
    assert abilities.obstacle(whole, "training") is None
    with pytest.raises(GraphError, match=r"aten\.from_file\.default"):
        any_plane.load([evil], ProgramOptions())
    with pytest.raises(ConfigError, match=r"'abacus' is unknown; available here: .*torch"):
        plane("abacus")


def test_writing_to_an_activation_is_refused(any_plane: Plane) -> None:
    maker = GraphMaker({"s0": 2})
    x = maker.input("x", TensorType("float32", ("s0",)), "data")
    y = maker.call("aten.mul.Tensor", x, 2.0, shape=("s0",))
    z = maker.call("aten.add_.Tensor", y, 1.0, shape=("s0",))
    loss = maker.call("aten.sum.default", z, shape=())
    with pytest.raises(GraphError, match="which is no buffer"):
        any_plane.load(cut(maker.graph(loss), []), ProgramOptions())


# --- random numbers ------------------------------------------------------------------------------------------


def dropout_run(any_plane: Plane, seed: int, key: MicrobatchKey, *, train: bool = True) -> float:
    subdags, program = language_model(any_plane, [12], ProgramOptions(seed=seed), dropout=0.5)
    pipeline = Pipeline(subdags, dict.fromkeys(range(2), program))
    torch.rand(5)  # the process's own generator has no say
    return pipeline.forward(key, SIZES, token_batch(0, 0), train=train)


def test_dropout_draws_from_seed_step_and_microbatch_only(any_plane: Plane) -> None:
    wanted = dropout_run(any_plane, 1, MicrobatchKey(3, 2))
    assert dropout_run(any_plane, 1, MicrobatchKey(3, 2)) == wanted
    others = [dropout_run(any_plane, 2, MicrobatchKey(3, 2)), dropout_run(any_plane, 1, MicrobatchKey(3, 1))]
    others.append(dropout_run(any_plane, 1, MicrobatchKey(2, 2)))
    assert wanted not in others
    assert len(set(others)) == 3
    before = torch.get_rng_state()
    dropout_run(any_plane, 1, KEY)
    torch.set_rng_state(before)
    first = torch.rand(6)
    torch.set_rng_state(before)
    assert torch.equal(torch.rand(6), first)
    assert dropout_run(any_plane, 1, KEY, train=False) == dropout_run(any_plane, 2, MicrobatchKey(9, 9), train=False)


# --- batch statistics ----------------------------------------------------------------------------------------


def batch_norm() -> tuple[list[SubDag], nn.BatchNorm1d]:
    module = nn.BatchNorm1d(3)
    maker = GraphMaker({"s0": 4})
    x = maker.input("x", TensorType("float32", ("s0", 3)), "data")
    assert isinstance(module.running_mean, torch.Tensor)
    assert isinstance(module.running_var, torch.Tensor)
    assert isinstance(module.num_batches_tracked, torch.Tensor)
    weight, bias = maker.weight("weight", module.weight), maker.weight("bias", module.bias)
    mean = maker.weight("running_mean", module.running_mean, kind="buffer")
    variance = maker.weight("running_var", module.running_var, kind="buffer")
    count = maker.weight("num_batches_tracked", module.num_batches_tracked, kind="buffer")
    maker.call("aten.add_.Tensor", count, 1, dtype="int64", shape=())
    y = maker.call("aten.batch_norm.default", x, weight, bias, mean, variance, True, 0.1, 1e-5, True, shape=("s0", 3))
    y = maker.call("aten.pow.Tensor_Scalar", y, 3, shape=("s0", 3))
    return cut(maker.graph(maker.call("aten.sum.default", y, shape=())), []), module


def test_batch_statistics(any_plane: Plane) -> None:
    """They follow training, stand still in evaluation, and go back when a step is discarded."""
    subdags, module = batch_norm()
    program = any_plane.load(subdags, ProgramOptions(optimizer=OptimizerConfig(kind="sgd")))
    load_weights(program, module.state_dict())
    pipeline = Pipeline(subdags, {0: program})
    batches = [{"x": torch.randn(4, 3) * 2 + 1} for _ in range(3)]

    def expect() -> None:
        for key, value in module.state_dict().items():
            assert_same(any_plane, tensor(program.read(key)), value, key)

    for index, batch in enumerate(batches[:2]):
        found = pipeline.forward(MicrobatchKey(0, index), {"s0": 4}, batch)
        pipeline.backward(MicrobatchKey(0, index), 1.0)
        wanted = module(batch["x"]).pow(3).sum()
        wanted.backward()
        assert_same_losses(any_plane, [found], [wanted.item()])
    program.update(0.1)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    expect()
    found = pipeline.forward(KEY, {"s0": 4}, batches[2], train=False)
    assert_same_losses(any_plane, [found], [module.eval()(batches[2]["x"]).pow(3).sum().item()])
    expect()
    pipeline.forward(MicrobatchKey(1, 0), {"s0": 4}, batches[2])
    assert int(tensor(program.read("num_batches_tracked"))) == 3
    program.discard()
    expect()
    assert not tensor(program.read_gradient("weight")).any()


# --- boundaries ----------------------------------------------------------------------------------------------


def test_boundaries_of_every_kind(any_plane: Plane) -> None:
    """An output used inside as well, a passed-through input, integers, views, an unused gradient."""
    x_type, i_type = TensorType("float32", (2, 3)), TensorType("int64", (2,))
    maker = GraphMaker({})
    weight = torch.randn(2, 3)
    w = maker.weight("w", weight)
    graph = maker.graph(Ref(ValueName("unused")))

    def call(name: str, op: str, *args: Any) -> Node:
        return Node(name, op, args, {}, (ValueName(name),))

    names = {name: ValueName(name) for name in ("x", "unused", "i", "y", "v", "j")}
    stage = SubDag(
        1,
        {},
        (),
        graph.weights,
        (
            call("y", "aten.mul.Tensor", Ref(names["x"]), w),
            call("v", "aten.t.default", Ref(names["y"])),
            call("j", "aten.add.Tensor", Ref(names["i"]), 1),
        ),
        {
            names["y"]: x_type,
            names["v"]: TensorType("float32", (3, 2)),
            names["j"]: i_type,
        },
        tuple(
            Transfer(names[name], 0, 1, type, gradient)
            for name, type, gradient in (("x", x_type, True), ("unused", x_type, True), ("i", i_type, False))
        ),
        (
            Transfer(names["y"], 1, 2, x_type, True),
            Transfer(names["y"], 1, 3, x_type, True),
            Transfer(names["v"], 1, 2, TensorType("float32", (3, 2)), True),
            Transfer(names["j"], 1, 2, i_type, False),
            Transfer(names["x"], 1, 2, x_type, True),
        ),
        None,
    )
    program = any_plane.load([stage], ProgramOptions())
    program.load("w", data(weight))
    x, i = torch.randn(2, 3), torch.tensor([4, 5])
    sent = program.forward(1, KEY, {}, {"x": data(x), "unused": data(x), "i": data(i)})
    assert sorted(sent) == ["j", "v", "x", "y"]
    assert_same(any_plane, tensor(sent["y"]), x * weight)
    assert_same(any_plane, tensor(sent["v"]), (x * weight).T)
    assert torch.equal(tensor(sent["j"]), i + 1)
    first, second, turned, through = (torch.randn(shape) for shape in ((2, 3), (2, 3), (3, 2), (2, 3)))
    back = program.backward(1, KEY, {"y": [data(first), data(second)], "v": [data(turned)], "x": [data(through)]})
    wanted = first + second + turned.T
    torch.testing.assert_close(tensor(back["x"]), wanted * weight + through)
    assert not tensor(back["unused"]).any()
    assert sorted(back) == ["unused", "x"]
    torch.testing.assert_close(tensor(program.read_gradient("w")), wanted * x)


def test_gradients_never_share_memory_with_what_came_from_outside(any_plane: Plane) -> None:
    """torch hands `w` the very memory of the gradient that came in; adding to it would change a peer's data."""
    maker = GraphMaker({})
    first, second = torch.randn(4), torch.randn(4)
    maker.weight("w1", first)
    maker.weight("w2", second)
    type = TensorType("float32", (2, 2))
    nodes = []
    for index, (name, op, args) in enumerate(
        (
            ("a", "aten.view.default", (Ref(ValueName("w1")), (2, 2))),
            ("b", "aten.view.default", (Ref(ValueName("w2")), (2, 2))),
            ("c", "aten.add.Tensor", (Ref(ValueName("a")), Ref(ValueName("b")))),
            ("y", "aten.add.Tensor", (Ref(ValueName("c")), Ref(ValueName("x")))),
        )
    ):
        assert index == len(nodes)
        nodes.append(Node(name, op, args, {}, (ValueName(name),)))
    types = {ValueName(name): type for name in "abcy"}
    receives, sends = (Transfer(ValueName("x"), 0, 1, type, True),), (Transfer(ValueName("y"), 1, 2, type, True),)
    weights = maker.graph(Ref(ValueName("y"))).weights
    stage = SubDag(1, {}, (), weights, tuple(nodes), types, receives, sends, None)
    program = any_plane.load([stage], ProgramOptions())
    program.load("w1", data(first))
    program.load("w2", data(second))
    kept = []
    for index in range(3):
        key = MicrobatchKey(0, index)
        program.forward(1, key, {}, {"x": data(torch.ones(2, 2))})
        gradient = torch.full((2, 2), 1.0 + index)
        given = TensorData("float32", (2, 2), memoryview(gradient.numpy()).cast("B"))
        back = program.backward(1, key, {"y": [given]})
        kept.append((gradient, back["x"], 1.0 + index))
    for gradient, returned, value in kept:
        assert gradient.eq(value).all()
        assert tensor(returned).eq(value).all()
    for key_name in ("w1", "w2"):
        assert tensor(program.read_gradient(key_name)).eq(6).all()


def test_frozen_weights_and_weights_without_gradient_stay(any_plane: Plane) -> None:
    maker = GraphMaker({"s0": 2})
    x = maker.input("x", TensorType("float32", ("s0", 3)), "data")
    frozen, trained, idle = torch.randn(3, 3), torch.randn(3, 3), torch.randn(3)
    h = maker.call("aten.linear.default", x, maker.weight("frozen", frozen, trainable=False), shape=("s0", 3))
    h = maker.call("aten.linear.default", h, maker.weight("trained", trained), shape=("s0", 3))
    cold = maker.call("aten.detach.default", maker.weight("idle", idle), shape=(3,))
    h = maker.call("aten.add.Tensor", h, cold, shape=("s0", 3))
    subdags = cut(maker.graph(maker.call("aten.sum.default", h, shape=())), [])
    program = any_plane.load(subdags, ProgramOptions(optimizer=OptimizerConfig(weight_decay=0.1)))
    load_weights(program, {"frozen": frozen, "trained": trained, "idle": idle})
    batches = lambda step, index: {"x": torch.ones(2, 3)}  # noqa: E731
    Pipeline(subdags, {0: program}).train(2, 1, 0.1, batches, {"s0": 2})
    assert torch.equal(tensor(program.read("frozen")), frozen)
    assert torch.equal(tensor(program.read("idle")), idle)  # no weight decay either, as in torch
    assert not torch.equal(tensor(program.read("trained")), trained)
    with pytest.raises(GraphError, match="not trained"):
        program.read_gradient("frozen")


def test_read_and_sent_tensors_do_not_change_with_the_weights(any_plane: Plane) -> None:
    type = TensorType("float32", (2, 2))
    maker = GraphMaker({})
    weight = torch.randn(2, 2)
    maker.weight("w", weight)
    node = Node("y", "aten.t.default", (Ref(ValueName("w")),), {}, (ValueName("y"),))
    sends = (Transfer(ValueName("y"), 0, 1, type, True),)
    weights = maker.graph(Ref(ValueName("y"))).weights
    stage = SubDag(0, {}, (), weights, (node,), {ValueName("y"): type}, (), sends, None)
    program = any_plane.load([stage], ProgramOptions())
    program.load("w", data(weight))
    sent = program.forward(0, KEY, {}, {})["y"]
    read = program.read("w")
    program.backward(0, KEY, {"y": [data(torch.ones(2, 2))]})
    program.update(0.5)
    assert torch.equal(tensor(sent), weight.T)
    assert torch.equal(tensor(read), weight)
    assert not torch.equal(tensor(program.read("w")), weight)


# --- memory --------------------------------------------------------------------------------------------------


def test_memory_is_told_and_freed(any_plane: Plane) -> None:
    weight_bytes = sum(value.nbytes for value in language_model_weights().values())
    subdags, program = language_model(any_plane, [])
    assert program.memory_bytes() == weight_bytes
    Pipeline(subdags, {0: program}).forward(KEY, SIZES, token_batch(0, 0))
    kept_bytes = program.memory_bytes()
    assert kept_bytes > weight_bytes
    program.discard(KEY)
    assert program.memory_bytes() < kept_bytes
    program.close()
    assert program.memory_bytes() == 0


def test_discard_frees_and_forgets(any_plane: Plane) -> None:
    subdags, program = language_model(any_plane, [12])
    pipeline = Pipeline(subdags, dict.fromkeys(range(2), program))
    for index in range(2):
        pipeline.forward(MicrobatchKey(0, index), SIZES, token_batch(0, index))
    program.discard(MicrobatchKey(0, 0))
    with pytest.raises(FusionError, match="did not go forward"):
        program.backward(1, MicrobatchKey(0, 0), {})
    pipeline.backward(MicrobatchKey(0, 1), 1.0)
    assert sum(program.gradient_norms().values()) > 0
    program.discard()
    assert program.gradient_norms() == {}
    assert program.optimizer_step() == 0
