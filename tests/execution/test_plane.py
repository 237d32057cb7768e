"""What the torch plane says about devices, and what it measures."""

from __future__ import annotations

import logging
import threading

import psutil
import pytest
import torch
from small_graphs import (
    Pipeline,
    cut,
    language_model_graph,
    language_model_loss,
    language_model_weights,
    load_weights,
    token_batch,
)

from fusionai.errors import ConfigError
from fusionai.execution.plane import MicrobatchKey, ProgramOptions
from fusionai.execution.planes import available_planes, plane
from fusionai.execution.torch_plane import devices
from fusionai.graph.vocabulary import FLOP_CLASSES

torch.set_num_threads(1)


def test_planes_and_devices() -> None:
    assert "torch" in available_planes()
    torch_plane = plane("torch")
    assert torch_plane.name == "torch"
    assert torch_plane.devices()[-1] == "cpu"
    assert len(torch_plane.describe("cpu")) > 2
    assert torch_plane.device_memory_bytes("cpu") == psutil.virtual_memory().total
    with pytest.raises(ConfigError, match="usable: "):
        torch_plane.describe("tpu")


def test_description_without_the_systems_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise OSError("no such file")

    monkeypatch.setattr(devices, "_system_processor_name", refuse)
    assert devices.device_description("cpu")


def test_calibration_is_plausible() -> None:
    found = plane("torch").calibrate("cpu", seconds=0.5)
    assert {name.removesuffix(".bf16") for name in found.flops_per_s} == set(FLOP_CLASSES)
    assert all(1e8 < value < 1e15 for value in found.flops_per_s.values())
    assert 1e8 < found.memory_bytes_per_s < 1e13
    assert 1e-7 < found.overhead_s < 1e-2


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
