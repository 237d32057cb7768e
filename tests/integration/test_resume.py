"""Going on from a checkpoint equals never having stopped: weights, optimizer state, losses, whoever computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import PATIENCE_S, POSIX, run, started, tiny_job, until_training
from models import ConvolutionalNet, image_batch, language_model, token_batch
from torch import nn

import fusionai
from fusionai.errors import CheckpointError, ConfigError, JobError
from fusionai.execution.plane import OptimizerConfig
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.training_job import Observer, StepEvent, TrainingResult
from fusionai.training.checkpoint import CheckpointReader, latest
from fusionai.training.data.packed import PackedText

TOLERANCE = 1e-6
WHOLE, PART, EVERY = 160, 80, 20
"""Steps of the runs of the command line, and between their checkpoints."""


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = (found.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), 1e-12)


# --- the command line ---------------------------------------------------------------------------------------


def losses(run_folder: Path) -> list[tuple[int, float]]:
    """Return step and loss of every step's record of a run, in the order in which they were made."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights and the optimizer's state in a checkpoint, by name."""
    reader = CheckpointReader(checkpoint)
    reader.verify()
    found = {}
    for name in (*reader.weights, *reader.states):
        data = reader.read(name)
        found[name] = torch.frombuffer(data.data, dtype=getattr(torch, data.dtype)).reshape(data.shape)
    return found


def assert_same_run(found: Path, expected: Path, *, within: float = TOLERANCE) -> None:
    """Require that two runs ended at the same weights and optimizer state, by the same losses."""
    assert dict(losses(found)) == pytest.approx(dict(losses(expected)), rel=within)
    last = expected / "checkpoints" / f"step-{WHOLE:06d}"
    reference = tensors(last)
    ours = tensors(found / "checkpoints" / last.name)
    assert ours.keys() == reference.keys()
    assert any("::" in name for name in ours), "the optimizer's state is there too"
    for name, tensor in ours.items():
        assert relative(tensor, reference[name]) <= within, name


@pytest.fixture(scope="module")
def whole(pool: LocalPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was never stopped: its folder, with the job file beside it, and its result."""
    folder = tmp_path_factory.mktemp("whole")
    job = tiny_job(
        folder,
        training={"steps": WHOLE, "checkpoint_every": EVERY},
        schedule={"kind": "constant"},
        placement={"compnodes": 2},
    )
    result = run("train", job, "--broker", pool.token, "--run", folder / "run", "--json").succeeded()
    return folder / "run", result


def test_a_resumed_run_equals_one_that_never_stopped(
    pool: LocalPool, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """By the command line, from two compnodes to three."""
    reference, _ = whole
    job = reference.parent / "job.toml"
    ours = tmp_path / "run"
    steps = ["--set", f"training.steps={PART}"]
    first = run("train", job, "--broker", pool.token, "--run", ours, "--json", *steps).succeeded()
    assert (first["steps"], Path(first["checkpoint"]).name) == (PART, f"step-{PART:06d}")
    more = ["--set", f"training.steps={WHOLE}", "--set", "placement.compnodes=3"]
    second = run("train", "--resume", ours, "--broker", pool.token, "--json", *more).succeeded()
    assert (second["steps"], second["run"]) == (WHOLE - PART, str(ours))
    assert len(set(second["compnodes"]) - {"owner"}) == 3
    assert_same_run(ours, reference)


@pytest.mark.skipif(not POSIX, reason="sends POSIX signals")
def test_a_run_whose_owner_was_killed_goes_on_from_its_last_checkpoint(
    pool: LocalPool, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    reference, _ = whole
    ours = tmp_path / "run"
    job = reference.parent / "job.toml"
    with started("train", job, "--broker", pool.token, "--run", ours, "--json") as owner:
        until_training(ours, owner, steps=2 * EVERY + 5)
        owner.kill()
        owner.wait(PATIENCE_S)
    before = losses(ours)
    kept = latest(ours)
    assert kept is not None
    done = CheckpointReader(kept).manifest.step
    assert done % EVERY == 0
    assert 0 < done <= len(before) < WHOLE
    second = run("train", "--resume", ours, "--broker", pool.token, "--json").succeeded()
    assert second["steps"] == WHOLE - done
    after = losses(ours)
    assert after[: len(before)] == before
    assert [step for step, _ in after[len(before) :]] == list(range(done + 1, WHOLE + 1))
    assert_same_run(ours, reference)


def test_a_run_goes_on_in_another_folder_with_its_own_text(
    pool: LocalPool, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Another split of a step has the same sequences. That the source of the text has changed does not matter."""
    reference, _ = whole
    first, second, text = tmp_path / "first", tmp_path / "second", tmp_path / "text.txt"
    job = tiny_job(
        tmp_path,
        training={"steps": PART, "checkpoint_every": EVERY},
        schedule={"kind": "constant"},
        placement={"compnodes": 2},
    )
    run("train", job, "--broker", pool.token, "--run", first, "--json").succeeded()
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    text.write_text("something else altogether\n" * 1000, encoding="utf-8")
    (second / "data").mkdir(parents=True)
    (second / "data" / "text.npy").write_bytes(b"what an attempt left that was refused")
    split = {"steps": WHOLE, "batch_size": 4, "microbatches": 1}
    more = [word for name, value in split.items() for word in ("--set", f"training.{name}={value}")]
    into = ["--resume", first, "--run", second]
    result = run("train", *into, "--broker", pool.token, "--json", *more).succeeded()
    assert (result["steps"], result["run"]) == (WHOLE - PART, str(second))
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    with (second / "metrics.jsonl").open("ab") as file:
        file.write((first / "metrics.jsonl").read_bytes())
    assert_same_run(second, reference, within=1e-5)  # sums over a step's tokens go in another order


def test_transformers_opens_a_checkpoint_and_computes_the_same_loss(whole: tuple[Path, dict[str, Any]]) -> None:
    reference, result = whole
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(result["checkpoint"]).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(result["checkpoint"])
    assert len(tokenizer) == model.config.vocab_size
    batches = PackedText(reference / "data" / "text.npy", 16).heldout_batches(2, 4)
    found = []
    for batch in batches:
        ids = torch.frombuffer(bytearray(batch["input_ids"].data), dtype=torch.int64).reshape(batch["input_ids"].shape)
        with torch.no_grad():
            found.append(model(input_ids=ids, labels=ids).loss.item())
    assert found
    assert sum(found) / len(found) == pytest.approx(result["heldout_loss"], rel=1e-5)
    assert result["heldout_loss"] < 0.75 * result["first_loss"], "it has learnt"


# --- the Python API -------------------------------------------------------------------------------------------


class Losses(Observer):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def stepped(self, event: StepEvent) -> None:
        self.values.append(event.loss)


class Dropping(nn.Module):
    """A small network with dropout: features (B, 6) and classes (B,) to a loss."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(6, width)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(width, 3)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy loss."""
        hidden = self.dropout(torch.relu(self.first(features)))
        return nn.functional.cross_entropy(self.second(hidden), labels)


def feature_batch(step: int, index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    labels = torch.randint(0, 3, (8,), generator=generator)
    return {"features": torch.randn(8, 6, generator=generator), "labels": labels}


def model_and_batch(name: str) -> tuple[nn.Module, Any]:
    if name == "cnn":
        return ConvolutionalNet(), image_batch(4)
    if name == "dropout":
        return Dropping(), feature_batch
    return language_model(name), token_batch(name, 2, 16)


ADAMW = OptimizerConfig(kind="adamw", weight_decay=0.01)
SGD = OptimizerConfig(kind="sgd", momentum=0.9)


@pytest.mark.parametrize(
    ("name", "optimizer", "first", "second", "privacy"),
    [
        ("llama-tied", ADAMW, 2, 3, "private"),
        ("cnn", SGD, 3, 1, "open"),  # its batch norm keeps statistics beside the weights
        ("dropout", ADAMW, 1, 1, "open"),
    ],
)
def test_resuming_from_python(
    pool: LocalPool, tmp_path: Path, name: str, optimizer: OptimizerConfig, first: int, second: int, privacy: Any
) -> None:
    def train(steps: int, compnodes: int, folder: str, **options: Any) -> tuple[TrainingResult, nn.Module, list[float]]:
        module, batch = model_and_batch(name)
        heard = Losses()
        result = fusionai.train(
            module,
            batch,
            broker=pool.token,
            steps=steps,
            microbatches=2,
            learning_rate=5e-3,
            optimizer=optimizer,
            gradient_clip=1.0,
            privacy=privacy,
            compnodes=compnodes,
            run=tmp_path / folder,
            observer=heard,
            **options,
        )
        return result, module, heard.values

    _, expected, in_one_go = train(20, first, "whole")
    _, _, before = train(8, first, "parts")
    result, resumed, after = train(20, second, "parts", resume=tmp_path / "parts")
    assert (len(before), len(after), result.steps) == (8, 12, 12)
    assert [*before, *after] == pytest.approx(in_one_go, rel=TOLERANCE)
    reference = expected.state_dict()
    for key, tensor in resumed.state_dict().items():
        assert relative(tensor, reference[key]) <= TOLERANCE, key
    names = [path.name for path in sorted((tmp_path / "parts" / "checkpoints").iterdir())]
    assert names == ["step-000008", "step-000020"]


class Deeper(Dropping):
    """Has a layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(16, 16)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy loss."""
        hidden = self.middle(torch.relu(self.first(features)))
        return nn.functional.cross_entropy(self.second(hidden), labels)


class Frozen(Dropping):
    """Trains its second layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


def test_what_cannot_be_resumed(pool: LocalPool, tmp_path: Path) -> None:
    def train(module: nn.Module, steps: int, **options: Any) -> None:
        fixed: dict[str, Any] = {"broker": pool.token, "privacy": "open", "run": tmp_path / "run"}
        fusionai.train(module, feature_batch, steps=steps, **{**fixed, **options})

    train(Dropping(), 2)
    train(Deeper(), 1, run=tmp_path / "deeper")
    train(Frozen(), 1, run=tmp_path / "frozen")
    with pytest.raises(ConfigError, match="holds a run already"):
        train(Dropping(), 2)
    made = tmp_path / "run" / "checkpoints" / "step-000002"
    with pytest.raises(JobError, match=r"has 2 steps done and training\.steps is 2: raise training\.steps"):
        train(Dropping(), 2, resume=tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"shape \[16, 6\] in {made}, but \[20, 6\] in the model"):
        train(Dropping(20), 4, resume=tmp_path / "run")
    with pytest.raises(CheckpointError, match="nowhere holds no complete checkpoint"):
        train(Dropping(), 4, resume=tmp_path / "nowhere", run=None)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(CheckpointError, match=rf"{made} is a checkpoint and no run: give .*\({tmp_path / 'run'}\)"):
        train(Dropping(), 4, resume=made, run=None)
    with pytest.raises(CheckpointError, match=rf"{made} lacks the weight 'middle\.\w+'"):
        train(Deeper(), 4, resume=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"holds the weight 'middle\.\w+', which has no place in the model"):
        train(Dropping(), 4, resume=tmp_path / "deeper", run=None)
    with pytest.raises(
        CheckpointError, match=r"holds the optimizer state 'first\.\w+::exp_avg\w*', for which adamw has no"
    ):
        train(Frozen(), 4, resume=tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"no optimizer state 'first\.\w+::exp_avg\w*'.*or that weight was frozen"
    ):
        train(Dropping(), 4, resume=tmp_path / "frozen", run=None)
    with pytest.raises(CheckpointError, match=r"holds the optimizer state '.*::exp_avg\w*', for which sgd has no use"):
        train(Dropping(), 4, resume=tmp_path / "run", optimizer=OptimizerConfig(kind="sgd"))
    with RunFolder(tmp_path / "run"), pytest.raises(ConfigError, match="another owner trains in the run folder"):
        train(Dropping(), 4, resume=tmp_path / "run")
    (tmp_path / "deeper" / "job.toml").write_text('name = "x"\n[model]\npath = "y"\n', encoding="utf-8")
    with pytest.raises(
        ConfigError, match="deeper was made from a job file: go on with it by `fusionai train --resume`"
    ):
        train(Deeper(), 4, resume=tmp_path / "deeper", run=None)
    with pytest.raises(CheckpointError, match=r"no optimizer state '\w+\.\w+::momentum\w*'"):
        train(Dropping(), 4, resume=tmp_path / "run", optimizer=SGD)
    assert latest(tmp_path / "run") == made
