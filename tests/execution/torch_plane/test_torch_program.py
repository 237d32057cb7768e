"""What holds for the torch plane alone: memory to the byte, bf16, torch's clipping, threads and compilers."""

from __future__ import annotations

import gc
import logging
import math
import threading
from typing import Any

import pytest
import torch
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
from torch import nn

from fusionai.errors import ConfigError
from fusionai.execution.plane import Clipping, OptimizerConfig, ProgramOptions
from fusionai.execution.planes import plane
from fusionai.execution.program import MicrobatchKey
from fusionai.execution.torch_plane import devices

torch.set_num_threads(1)

SIZES = {"s0": 2, "s1": 8}
KEY = MicrobatchKey(0, 0)


def tensor_memory_bytes() -> int:
    """Memory of every tensor alive in this process."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, nn.Parameter):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_is_told_and_freed() -> None:
    weights = language_model_weights()
    weight_bytes = sum(value.nbytes for value in weights.values())
    before = tensor_memory_bytes()
    subdags = cut(language_model_graph(weights), [])
    program = plane("torch").load(subdags, ProgramOptions())
    load_weights(program, weights)
    assert program.memory_bytes() == weight_bytes
    pipeline = Pipeline(subdags, {0: program})
    saved = 0

    def record(value: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        if value.untyped_storage().data_ptr() not in known:
            known.add(value.untyped_storage().data_ptr())
            saved += value.untyped_storage().nbytes()
        return value.detach()  # the value itself would keep its own graph alive

    pipeline.forward(MicrobatchKey(0, 9), SIZES, token_batch(0, 0), train=False)
    idle_bytes = program.memory_bytes()
    assert weight_bytes < idle_bytes <= weight_bytes + 8 * 16  # the positions, made once
    known = {item.untyped_storage().data_ptr() for item in program._weights.tensors.values()}  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(record, lambda value: value):
        pipeline.forward(KEY, SIZES, token_batch(0, 0))
    program.discard(KEY)
    assert program.memory_bytes() == idle_bytes + 8 * 16  # training has positions of its own
    pipeline.forward(KEY, SIZES, token_batch(0, 0))
    kept_bytes = program.memory_bytes() - idle_bytes - 8 * 16
    # Saved tensors, without the positions counted already, with the loss.
    assert abs(kept_bytes - saved) <= 8 * 16 + 64
    pipeline.backward(KEY, 1.0)
    assert program.memory_bytes() == idle_bytes + 8 * 16 + weight_bytes
    program.update(1e-2)
    assert program.memory_bytes() == idle_bytes + 8 * 16 + 2 * weight_bytes
    program.close()
    assert program.memory_bytes() == 0
    del program, pipeline, subdags
    assert tensor_memory_bytes() <= before


def test_bf16_equals_autocast_of_one_process() -> None:
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights), [4, 13, 27])
    config = OptimizerConfig(kind="adamw", weight_decay=0.01)
    program = plane("torch").load(subdags, ProgramOptions(precision="bf16", optimizer=config))
    load_weights(program, weights)

    def fresh() -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        return leaves, torch.optim.AdamW(leaves.values(), 1e-2, weight_decay=0.01)

    def loss(parameters: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return language_model_loss(parameters, batch)

    expected, optimizer = fresh()
    wanted = train_plainly(loss, expected, optimizer, 10, 2)
    pipeline = Pipeline(subdags, dict.fromkeys(range(4), program))
    assert pipeline.train(10, 2, 1e-2) == pytest.approx(wanted, rel=1e-3)
    full = train_plainly(language_model_loss, *fresh(), 10, 2)
    assert pipeline.train(1, 1, 1e-2) != full[:1]  # it did run in another precision
    for name, value in expected.items():
        if name != "key.bias":
            found = tensor(program.read(name))
            assert (found - value.detach()).norm() < 0.1 * value.detach().norm(), name


def test_clipping_is_that_of_torch() -> None:
    for norms, limit in (([3.0, 4.0], 1.0), ([0.3, 0.4], 1.0), ([1e-9], 0.5), ([7.0] * 300, 0.25), ([], 1.0)):
        weights = [torch.zeros(1, requires_grad=True) for _ in norms]
        for weight, norm in zip(weights, norms, strict=True):
            weight.grad = torch.full((1,), norm)
        found = plane("torch").clipping(norms, limit)
        assert found.norm == float(torch.nn.utils.clip_grad_norm_(weights, limit))
        for weight, norm in zip(weights, norms, strict=True):
            assert torch.equal(torch.full((1,), norm) * found.factor, weight.grad)  # type: ignore[arg-type]
    assert plane("torch").clipping([3.0, 4.0], 0.0) == Clipping(5.0, 1.0)
    assert math.isnan(plane("torch").clipping([math.nan, 1.0], 1.0).norm)
    assert plane("torch").clipping([math.inf, 1.0], 1.0).norm == math.inf


def test_description_without_the_systems_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise OSError("no such file")

    monkeypatch.setattr(devices, "_system_processor_name", refuse)
    assert devices.device_description("cpu")


def test_thread_limit_reaches_a_thread_that_computed_before() -> None:
    torch_plane = plane("torch")
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights), [])
    program = torch_plane.load(subdags, ProgramOptions())
    load_weights(program, weights)
    seen: list[int] = []
    limited, computed = threading.Event(), threading.Event()

    def compute() -> None:
        torch.set_num_threads(2)
        torch.randn(100, 100) @ torch.randn(100, 100)
        computed.set()
        limited.wait(10)
        Pipeline(subdags, {0: program}).forward(MicrobatchKey(0, 0), {"s0": 2, "s1": 8}, token_batch(0, 0))
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        computed.wait(10)
        torch_plane.set_threads(1)
        limited.set()
        thread.join(30)
        assert seen == [1]
        with pytest.raises(ConfigError, match="at least 1"):
            torch_plane.set_threads(0)
    finally:
        devices._wanted_threads = None


def test_a_failing_compiler_does_not_stop_the_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", refuse)
    weights = language_model_weights()
    subdags = cut(language_model_graph(weights), [12])
    program = plane("torch").load(subdags, ProgramOptions(compile=True))
    load_weights(program, weights)
    pipeline = Pipeline(subdags, dict.fromkeys(range(2), program))
    with caplog.at_level(logging.WARNING):
        loss = pipeline.forward(MicrobatchKey(0, 0), {"s0": 2, "s1": 8}, token_batch(0, 0))
    assert loss == language_model_loss(weights, token_batch(0, 0)).item()
    assert [record.getMessage() for record in caplog.records] == [
        f"stage {stage} is not compiled and runs eagerly: RuntimeError: no compiler here" for stage in range(2)
    ]
