"""Buffers that forward assigns follow training and evaluation as in torch, and go back when a step is dropped."""

from __future__ import annotations

import torch
from closeness import assert_same, assert_same_losses
from small_graphs import Pipeline, tensor
from torch import Tensor, nn
from torch.nn import functional

from fusionai.execution.plane import OptimizerConfig, Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey
from fusionai.graph.capture import capture
from fusionai.graph.cuts import cut, cut_points

torch.set_num_threads(1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.first(x) - self.mean
        with torch.no_grad():
            self.mean.lerp_(hidden.mean(0), 0.1)
        self.seen = self.seen + 1
        return functional.cross_entropy(torch.tanh(self.second(torch.tanh(hidden))) / self.seen, labels)


def batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(4, 6, generator=generator),
        "labels": torch.randint(0, 6, (4,), generator=generator),
    }


def test_assigned_buffers(any_plane: Plane) -> None:
    module, reference = Counting(), Counting()
    captured = capture(module, batch(0))
    sizes = {"s0": 4}
    points = cut_points(captured.graph, sizes)
    subdags = cut(captured.graph, [points[-1]])
    programs = {
        subdag.index: any_plane.load([subdag], ProgramOptions(optimizer=OptimizerConfig(kind="sgd")))
        for subdag in subdags
    }
    for program in programs.values():
        for key in program.missing():
            program.load(key, captured.read(key))
    pipeline = Pipeline(subdags, programs)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)

    def expect() -> None:
        for program in programs.values():
            keys = program.keys()
            for key in keys:
                assert_same(any_plane, tensor(program.read(key)), reference.state_dict()[key], key)

    for step in range(3):
        optimizer.zero_grad()
        for index in range(2):
            given = batch(2 * step + index)
            found = pipeline.forward(MicrobatchKey(step, index), sizes, given)
            wanted = reference(**given)
            assert_same_losses(any_plane, [found], [wanted.item()])
            pipeline.backward(MicrobatchKey(step, index), 0.5)
            (0.5 * wanted).backward()
        for program in programs.values():
            program.update(0.1)
        optimizer.step()
        expect()
    assert int(reference.seen) == 6
    # In evaluation mode the module counts on, and so do the programs.
    reference.eval()
    for _ in range(2):
        with torch.no_grad():
            wanted = reference(**batch(9))
        found = pipeline.forward(MicrobatchKey(9, 0), sizes, batch(9), train=False)
        assert_same_losses(any_plane, [found], [wanted.item()])
        expect()
    assert int(reference.seen) == 8
    # A step that is dropped leaves no trace.
    pipeline.forward(MicrobatchKey(3, 0), sizes, batch(7))
    for program in programs.values():
        program.discard()
    expect()
