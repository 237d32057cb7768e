"""A pipeline of programs trains as one process does, on every plane."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closeness import assert_same, assert_same_losses, exact
from small_graphs import (
    Pipeline,
    cut,
    language_model_graph,
    language_model_loss,
    language_model_weights,
    load_weights,
    tensor,
    token_batch,
    train_plainly,
)

from fusionai.execution.plane import Clipping, OptimizerConfig, Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey, RoundProgram

torch.set_num_threads(1)

CUTS = {1: [], 2: [12], 3: [4, 20], 4: [4, 13, 27]}
ADAMW = OptimizerConfig(kind="adamw", weight_decay=0.01)
SGD = OptimizerConfig(kind="sgd", momentum=0.9, weight_decay=0.01)


def reference(config: OptimizerConfig, weights: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """torch's own optimizer in its default form."""
    parameters = list(weights.values())
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, 1e-2, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, 1e-2, (config.beta1, config.beta2), weight_decay=config.weight_decay)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance between two tensors in units of the second's norm."""
    return float((found - wanted.detach()).norm() / wanted.detach().norm())


def trainable(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone().requires_grad_() for name, value in weights.items()}


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=lambda config: config.kind)
@pytest.mark.parametrize("stages", CUTS)
def test_one_program_equals_plain_training(any_plane: Plane, stages: int, config: OptimizerConfig) -> None:
    """Tied weights in the first and last stage, key biases without a real gradient, three microbatches."""
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights), CUTS[stages])
    program = any_plane.load(subdags, ProgramOptions(optimizer=config))
    load_weights(program, weights)
    expected = trainable(weights)
    wanted = train_plainly(language_model_loss, expected, reference(config, expected), 20, 3)
    losses = Pipeline(subdags, dict.fromkeys(range(stages), program)).train(20, 3, 1e-2)
    assert_same_losses(any_plane, losses, wanted)
    assert losses[-1] < losses[0]
    assert program.optimizer_step() == 20
    for name, value in expected.items():
        # The gradient of a key bias is zero but for rounding, and AdamW makes whole steps of rounding.
        if exact(any_plane) or name != "key.bias":
            assert_same(any_plane, tensor(program.read(name)), value, name)


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=lambda config: config.kind)
def test_programs_that_share_a_tied_weight_agree(any_plane: Plane, config: OptimizerConfig) -> None:
    """Three programs; the first and the last exchange the gradients of the embedding before each update."""
    weights = language_model_weights()
    # No gradient of a key bias: only there does rounding, of which the exchanged sums have another order, matter.
    subdags = cut(language_model_graph(weights), CUTS[3])
    programs = {stage.index: any_plane.load([stage], ProgramOptions(optimizer=config)) for stage in subdags}
    for program in programs.values():
        load_weights(program, weights)
    expected = trainable(weights)
    optimizer = reference(config, expected)
    pipeline = Pipeline(subdags, programs)
    for step in range(8):
        for index in range(2):
            key = MicrobatchKey(step, index)
            loss = pipeline.forward(key, {"s0": 2, "s1": 8}, token_batch(step, index))
            pipeline.backward(key, 0.5)
            wanted = language_model_loss(expected, token_batch(step, index))
            (wanted * 0.5).backward()
            assert loss == pytest.approx(wanted.item(), rel=1e-5)
        shares = [programs[stage].read_gradient("embedding") for stage in (2, 0)]
        for stage in (0, 2):
            programs[stage].set_gradient("embedding", shares)
        for program in programs.values():
            program.update(1e-2)
        optimizer.step()
        optimizer.zero_grad()
    first, last = programs[0].read("embedding"), programs[2].read("embedding")
    assert bytes(first.data) == bytes(last.data)
    for program in programs.values():
        for name in program.keys():  # noqa: SIM118
            if name != "key.bias":
                found, wanted_weight = tensor(program.read(name)), expected[name]
                assert relative(found, wanted_weight) < 1e-5, name


def run(program: RoundProgram, subdags: Any, steps: range, microbatches: int = 2) -> list[float]:
    pipeline = Pipeline(subdags, dict.fromkeys(range(len(subdags)), program))
    losses = []
    for step in steps:
        for index in range(microbatches):
            key = MicrobatchKey(step, index)
            losses.append(pipeline.forward(key, {"s0": 2, "s1": 8}, token_batch(step, index)))
            pipeline.backward(key, 1 / microbatches)
        program.update(1e-2)
    return losses


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=lambda config: config.kind)
def test_resumes_exactly_from_weights_and_optimizer_state(any_plane: Plane, config: OptimizerConfig) -> None:
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights), CUTS[2])
    first = any_plane.load(subdags, ProgramOptions(optimizer=config))
    load_weights(first, weights)
    run(first, subdags, range(3))
    second = any_plane.load(subdags, ProgramOptions(optimizer=config))
    for key in first.keys():  # noqa: SIM118
        second.load(key, first.read(key))
        for state in config.states:
            second.load(key, first.read(key, state), state)
    second.set_optimizer_step(first.optimizer_step())
    assert run(second, subdags, range(3, 6)) == run(first, subdags, range(3, 6))
    for key in first.keys():  # noqa: SIM118
        assert bytes(first.read(key).data) == bytes(second.read(key).data)


def test_gradients_scale_and_norm(any_plane: Plane) -> None:
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights), [])
    program = any_plane.load(subdags, ProgramOptions(optimizer=ADAMW))
    load_weights(program, weights)
    expected = trainable(weights)
    Pipeline(subdags, {0: program}).forward(MicrobatchKey(0, 0), {"s0": 2, "s1": 8}, token_batch(0, 0))
    Pipeline(subdags, {0: program}).backward(MicrobatchKey(0, 0), 1.0)
    language_model_loss(expected, token_batch(0, 0)).backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.values(), 0.1)
    norms = program.gradient_norms()
    assert norms.keys() == expected.keys()
    assert program.gradient_norms(skip=["embedding"]).keys() == expected.keys() - {"embedding"}
    clipping = any_plane.clipping([norms[name] for name in expected], 0.1)
    assert clipping.norm == (float(norm) if exact(any_plane) else pytest.approx(float(norm), rel=1e-5))
    program.update(1e-2, gradient_scale=clipping.factor)
    reference(ADAMW, expected).step()
    for name, value in expected.items():
        if exact(any_plane) or name != "key.bias":
            assert_same(any_plane, tensor(program.read(name)), value, name)
    assert program.gradient_norms() == {}
    assert not tensor(program.read_gradient("embedding")).any()


def test_clipping(any_plane: Plane) -> None:
    assert any_plane.clipping([3.0, 4.0], 1.0).norm == pytest.approx(5.0)
    assert any_plane.clipping([3.0, 4.0], 1.0).factor == pytest.approx(0.2)
    assert any_plane.clipping([3.0, 4.0], 0.0) == Clipping(5.0, 1.0)
    assert any_plane.clipping([0.3, 0.4], 1.0).factor == 1.0
    assert math.isnan(any_plane.clipping([math.nan, 1.0], 1.0).norm)
    assert any_plane.clipping([math.inf, 1.0], 1.0).norm == math.inf


def test_a_plane_without_a_clipping_of_its_own_has_the_plain_one(any_plane: Plane) -> None:
    assert Plane.clipping(any_plane, [3.0, 4.0], 1.0) == Clipping(5.0, 0.2)
    assert Plane.clipping(any_plane, [3.0, 4.0], 0.0) == Clipping(5.0, 1.0)
    assert math.isnan(Plane.clipping(any_plane, [math.nan], 1.0).norm)


def test_sizes_may_change_between_microbatches(any_plane: Plane) -> None:
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights), CUTS[2])
    program = any_plane.load(subdags, ProgramOptions())
    load_weights(program, weights)
    pipeline = Pipeline(subdags, dict.fromkeys(range(2), program))
    for index, (size, length) in enumerate([(2, 8), (1, 5), (3, 1), (2, 32), (2, 8)]):
        batch = token_batch(0, index, size, length)
        wanted = language_model_loss(weights, batch).item()
        for train in (True, False):
            found = pipeline.forward(MicrobatchKey(0, index), {"s0": size, "s1": length}, batch, train=train)
            assert_same_losses(any_plane, [found], [wanted])
