"""Private jobs whose weights are partly frozen: cut privately, trained on two compnodes, and equal to plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import train_alone
from torch import Tensor, nn

import fusionai
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.training_job import Observer, StepEvent

VOCABULARY, WIDTH, LAYERS, STEPS, MICROBATCHES = 61, 16, 4, 4, 2


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class Merged(Adapted):
    """The same, but the adapter is added to the weight before the data comes."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.base.weight + self.up.weight @ self.down.weight, self.base.bias)


class Net(nn.Module):
    """An embedding, adapted layers and a head, made of the same numbers each time."""

    def __init__(self, layer: type[Adapted]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def batch(step: int, index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + index)
    ids, labels = torch.randint(0, VOCABULARY, (2, 3, 8), generator=generator)
    return {"input_ids": ids.clone(), "labels": labels.clone()}


def frozen(which: str) -> nn.Module:
    """Return the model with some weights frozen."""
    model = Net(Merged if "merged" in which else Adapted).train()
    for name, weight in model.named_parameters():
        adapter = ".up." in name or ".down." in name
        weight.requires_grad_(not adapter if "adapters" not in which else adapter)
    if which == "a frozen embedding":
        model.embedding.requires_grad_(False)  # type: ignore[union-attr]
    if which == "a frozen head":
        model.head.requires_grad_(False)  # type: ignore[union-attr]
    return model


class Losses(Observer):
    """Keeps the loss of every step, and who held what."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.stages: dict[str, set[str]] = {}

    def launched(self, launched: object, machines: object) -> None:
        for machine in machines:  # type: ignore[attr-defined]
            self.stages[machine.name] = set(machine.keys)

    def stepped(self, event: StepEvent) -> None:
        self.values.append(event.loss)


@pytest.mark.parametrize(
    "which", ["a frozen embedding", "a frozen head", "adapters alone train", "merged adapters alone train"]
)
def test_a_private_job_with_frozen_weights(which: str, pool: LocalPool, tmp_path: Path) -> None:
    alone = frozen(which)
    start = {name: weight.clone() for name, weight in alone.state_dict().items()}
    optimizer = {"kind": "sgd", "momentum": 0.9}
    expected = train_alone(alone, batch, steps=STEPS, microbatches=MICROBATCHES, optimizer=optimizer, learning_rate=0.1)
    together, losses = frozen(which), Losses()
    fusionai.train(
        together,
        batch,
        broker=pool.token,
        steps=STEPS,
        microbatches=MICROBATCHES,
        learning_rate=0.1,
        optimizer=OptimizerConfig(**optimizer),  # type: ignore[arg-type]
        compnodes=2,
        run=tmp_path / "run",
        observer=losses,
    )
    assert losses.values == pytest.approx(expected, rel=1e-5)
    trained = {name for name, weight in alone.named_parameters() if weight.requires_grad}
    for name, weight in together.state_dict().items():
        reference = alone.state_dict()[name]
        assert (weight - reference).norm() <= 1e-5 * reference.norm(), name
        if name in trained:
            assert not torch.equal(weight, start[name]), f"{name} was not trained"
        else:
            assert torch.equal(weight, start[name]), f"{name} is frozen"
    others = {name: keys for name, keys in losses.stages.items() if name.startswith("compnode")}
    assert len(others) == 2
    assert all(keys for keys in others.values())
    for keys in others.values():
        assert not any(key.startswith(("embedding.", "head.")) for key in keys), "embedding and head stay"
