"""Captured models, cut by the graph plane, train on every plane as plain torch does (torch: bit for bit)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from closeness import assert_same, assert_same_losses, exact
from small_graphs import Pipeline, tensor
from torch import nn

from fusionai.execution.plane import OptimizerConfig, Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.graph.capture import Captured, capture, capture_transformers
from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.model import Sizes, SubDag

torch.set_num_threads(1)

CapturedModel = tuple[str, nn.Module, Captured]

BATCH, LENGTH, CLASSES = 3, 10, 61
SHAPE: dict[str, Any] = {
    "vocab_size": CLASSES,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": CLASSES,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {**SHAPE, "num_key_value_heads": 2},
    "bert": {**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gemma3_text": {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "pad_token_id": 0},
    "mixtral": {**SHAPE, "num_key_value_heads": 2, "num_local_experts": 4},
}


class SmallNet(nn.Module):
    """A residual convolution with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.stem(images)))
        hidden = (hidden + torch.relu(self.middle(hidden))).mean(dim=(2, 3))
        return nn.functional.cross_entropy(self.head(hidden), labels)


def make(name: str) -> nn.Module:
    torch.manual_seed(5)
    if name == "cnn":
        return SmallNet().train()
    config = transformers.AutoConfig.for_model(name, bos_token_id=1, eos_token_id=2, **CONFIGS[name])
    kind: Any = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model: nn.Module = kind.from_config(config)
    return model.train()


def batch_of(name: str, step: int, index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + index)
    if name == "cnn":
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        return {"images": torch.randn(BATCH, 3, 6, 6, generator=generator), "labels": labels}
    ids = torch.randint(3, CLASSES, (BATCH, LENGTH), generator=generator)
    if name != "bert":
        return {"input_ids": ids, "labels": ids}
    hidden = torch.rand(ids.shape, generator=generator) < 0.4
    return {"input_ids": ids.masked_fill(hidden, 3), "labels": ids.masked_fill(~hidden, -100)}


@pytest.fixture(scope="module", params=[*CONFIGS, "cnn"])
def captured(request: pytest.FixtureRequest) -> CapturedModel:
    name: str = request.param
    model = make(name)
    if name == "cnn":
        return name, model, capture(model, batch_of(name, 0, 0))
    return name, model, capture_transformers(model, "masked" if name == "bert" else "causal", validate_values=False)  # type: ignore[arg-type]


def split(captured: Captured, stages: int) -> tuple[Sizes, tuple[SubDag, ...]]:
    graph = captured.graph
    sizes = {symbol: LENGTH if axis == 1 else BATCH for symbol, (_, axis) in graph.symbols.items()}
    candidates, count = cut_points(graph, sizes), len(graph.nodes)
    positions = {min(candidates, key=lambda p: abs(p - count * k / stages)) for k in range(1, stages)}
    return sizes, cut(graph, sorted(positions))


def load(plane: Plane, captured: Captured, subdags: tuple[SubDag, ...], options: ProgramOptions) -> RoundProgram:
    program = plane.load(subdags, options)
    for key in program.missing():
        program.load(key, captured.read(key))
    return program


def train_alone(
    model: nn.Module, name: str, optimizer: torch.optim.Optimizer, steps: int, microbatches: int, *, bf16: bool = False
) -> list[float]:
    losses = []
    for step in range(steps):
        for index in range(microbatches):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model(**batch_of(name, step, index))
            loss = output if isinstance(output, torch.Tensor) else output.loss
            (loss * (1 / microbatches)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@pytest.mark.parametrize(("stages", "kind"), [(1, "adamw"), (2, "sgd"), (3, "adamw"), (4, "adamw")])
def test_trains_as_plain_torch(any_plane: Plane, captured: CapturedModel, stages: int, kind: Any) -> None:
    name, _, made = captured
    sizes, subdags = split(made, stages)
    assert len(subdags) == stages
    if not exact(any_plane):
        kind = "sgd"  # AdamW makes whole steps of the rounding where a gradient is zero, as a key bias's is
    program = load(any_plane, made, subdags, ProgramOptions(optimizer=OptimizerConfig(kind=kind, weight_decay=0.01)))
    model = make(name)
    algorithm = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
    wanted = train_alone(model, name, algorithm(model.parameters(), lr=3e-3, weight_decay=0.01), 20, 2)
    pipeline = Pipeline(subdags, dict.fromkeys(range(stages), program))
    losses = pipeline.train(20, 2, 3e-3, lambda step, index: batch_of(name, step, index), sizes)
    assert_same_losses(any_plane, losses, wanted)
    state = state_of(model)
    compared = [key for key in program.keys() if key in state]  # noqa: SIM118
    assert len(compared) >= len(dict(model.named_parameters()))
    for key in compared:
        assert_same(any_plane, tensor(program.read(key)), state[key], key)


def test_bf16_stays_near_autocast_of_one_process(any_plane: Plane, captured: CapturedModel) -> None:
    name, _, made = captured
    sizes, subdags = split(made, 2)
    options = ProgramOptions(precision="bf16", optimizer=OptimizerConfig(kind="sgd"))
    program = load(any_plane, made, subdags, options)
    model = make(name)
    wanted = train_alone(model, name, torch.optim.SGD(model.parameters(), lr=1e-2), 5, 2, bf16=True)
    pipeline = Pipeline(subdags, dict.fromkeys(range(2), program))
    losses = pipeline.train(5, 2, 1e-2, lambda step, index: batch_of(name, step, index), sizes)
    assert losses == pytest.approx(wanted, rel=1e-3)
    key = MicrobatchKey(9, 0)
    evaluated = pipeline.forward(key, sizes, batch_of(name, 9, 0), train=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model.eval()(**batch_of(name, 9, 0))
    loss = output if isinstance(output, torch.Tensor) else output.loss
    assert evaluated == pytest.approx(loss.item(), rel=1e-3)
