"""Stages on a plane evaluate as `module.eval()` does in plain torch, and train as before."""

from __future__ import annotations

import pytest
import torch
from small_graphs import Pipeline, tensor

from fusionai.execution.plane import OptimizerConfig, Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey
from fusionai.graph.capture import capture
from fusionai.graph.cuts import cut
from fusionai.graph.evaluation import face
from two_faced_models import DIFFERENT, ROLES, SAME, Net, Noise, batch

torch.set_num_threads(1)

RANDOM = {"Noise", "Dropping", "AttendingWithDropout"}
"""Their training draws random numbers, which a stage does in its own way."""

SIZES = {"s0": 2, "s1": 10}


@pytest.mark.parametrize("kind", [*DIFFERENT, *SAME])
@pytest.mark.parametrize("stages", [1, 3])
def test_evaluates_as_plain_torch(any_plane: Plane, kind: type[Net], stages: int) -> None:
    made = capture(kind(), batch(0), roles=ROLES, validate_values=False)  # type: ignore[arg-type]
    linears = [place for place, node in enumerate(made.graph.nodes) if node.op == "aten.linear.default"]
    subdags = cut(made.graph, [linears[number * len(linears) // stages] for number in range(1, stages)])
    program = any_plane.load(subdags, ProgramOptions(optimizer=OptimizerConfig(kind="adamw", weight_decay=0.1)))
    for key in program.missing():
        program.load(key, made.read(key))
    programs = dict.fromkeys(range(stages), program)
    training, evaluation = Pipeline(subdags, programs), Pipeline([face(each, False) for each in subdags], programs)
    model = kind()
    algorithm = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        if kind.__name__ not in RANDOM:
            model.train()
            if kind.__name__ == "Normalising":
                model.norms[2].eval()  # as it was captured
            keys = [MicrobatchKey(step, index) for index in range(2)]
            losses = [training.forward(key, SIZES, batch(2 * step + key.index)) for key in keys]
            for key in keys:
                training.backward(key, 0.5)
            program.update(1e-2)
            wanted = []
            for index in range(2):
                output = model(**batch(2 * step + index))
                loss = output[0] if isinstance(output, tuple) else output
                (loss * 0.5).backward()
                wanted.append(loss.item())
            algorithm.step()
            algorithm.zero_grad()
            assert losses == pytest.approx(wanted, rel=1e-6)
        model.eval()
        for index in range(2):
            with torch.no_grad():
                expected = float(model(**batch(100 + index)))
            found = evaluation.forward(MicrobatchKey(0, index), SIZES, batch(100 + index), train=False)
            assert found == pytest.approx(expected, rel=1e-6)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key in program.keys():  # noqa: SIM118 (a method of programs)
        if key in state:
            torch.testing.assert_close(tensor(program.read(key)), state[key].detach(), rtol=1e-5, atol=1e-6)


def test_stages_may_evaluate_other_sizes(any_plane: Plane) -> None:
    made = capture(Noise(), batch(0), roles=ROLES)  # type: ignore[arg-type]
    (subdag,) = cut(made.graph, [])
    program = any_plane.load([subdag], ProgramOptions())
    for key in program.missing():
        program.load(key, made.read(key))
    inputs = batch(5, rows=3, length=4)
    found = Pipeline([face(subdag, False)], {0: program}).forward(
        MicrobatchKey(0, 0), {"s0": 3, "s1": 4}, inputs, train=False
    )
    assert found == pytest.approx(float(Noise().eval()(**inputs).detach()), rel=1e-6)
