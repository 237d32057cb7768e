"""Bad input, through the commands: each gets one clear line and a status; what was good is kept, the pool is freed."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import POSIX, Ended, all_free, last_job, run, tiny_job, until
from torch import nn

import fusionai
from fusionai.cli.main import main
from fusionai.errors import GraphError, JobError
from fusionai.graph.capture import capture
from fusionai.graph.encoding import decode, encode
from fusionai.network.identity import Identity
from fusionai.network.token import JoinToken
from fusionai.owner.local_pool import LocalPool
from fusionai.training.checkpoint import CheckpointReader, latest
from quick_pool import QuickPool

Here = Callable[..., Ended]


class _Returned(Ended):
    """How a command ended that ran in this process: starting torch anew for each case would take minutes."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Iterator[Here]:
    """Run a command in this process, through the entry point of the command line."""
    package = logging.getLogger("fusionai")

    def call(*arguments: str | Path) -> Ended:
        capfd.readouterr()
        status = main([*map(str, arguments), "--json"])
        return _Returned(status, *capfd.readouterr())

    yield call
    package.handlers.clear()
    package.propagate = True
    package.setLevel(logging.NOTSET)


@pytest.fixture
def free_pool(pool: LocalPool) -> Iterator[LocalPool]:
    """The shared pool; afterwards all of it must be free and alive again, and nobody else be left."""
    yield pool
    until(lambda: all_free(pool.token, *(name for name in pool.pids if name != "broker")), what="a free pool")
    assert {each.pid for each in psutil.Process().children(recursive=True)} >= set(pool.pids.values())


# --- job files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        ("steps = ", "steps == ", ("is not valid TOML", "line")),
        ("steps = ", "stepz = ", ("job.toml", "training", "stepz")),
        ("batch_size = 2", 'batch_size = "two"', ("training.batch_size", "int", "str")),
        ("batch_size = 2", "batch_size = 0", ("training.batch_size must be at least 1, got 0",)),
        ("sequence_length = 16", "sequence_length = 1", ("data.sequence_length must be at least 2, got 1",)),
        ("[model.config]", "[modle.config]", ("modle",)),
    ],
)
def test_a_malformed_job_file(here: Here, tmp_path: Path, old: str, new: str, texts: tuple[str, ...]) -> None:
    job = tiny_job(tmp_path)
    text = job.read_text(encoding="utf-8")
    assert old in text
    job.write_text(text.replace(old, new, 1), encoding="utf-8")
    here("train", job, "--broker", "unused", "--run", tmp_path / "run").failed(2, "ConfigError", *texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("training.steps", ("training.steps=500",)),
        ("training.stepz=3", ("training", "stepz")),
        ("training.steps=many", ("training.steps", "int")),
        ("training.steps=0", ("training.steps must be at least 1",)),
        ("training.steps.more=0", ("training.steps.more=0", "TABLE.FIELD=VALUE")),
    ],
)
def test_a_malformed_override(here: Here, tmp_path: Path, override: str, texts: tuple[str, ...]) -> None:
    ended = here("train", tiny_job(tmp_path), "--broker", "unused", "--set", override)
    ended.failed(2, "ConfigError", *texts)


def test_no_job_file(here: Here, tmp_path: Path) -> None:
    here("train", tmp_path / "none.toml", "--broker", "x").failed(2, "ConfigError", "none.toml does not exist")
    here("train", "--broker", "x").failed(2, "ConfigError", "give a job file, or --resume RUN")
    here("train", "--resume", tmp_path / "none", "--broker", "x").failed(2, "ConfigError", "none", "does not exist")


@pytest.mark.parametrize(
    ("fields", "error", "texts"),
    [
        ({"model_type": "dragon"}, "ConfigError", ("model.config", "'dragon'")),
        ({"hidden_sizes": 3}, "ConfigError", ("model.config.hidden_sizes is no field of 'llama'",)),
        ({"num_attention_heads": 5}, "ConfigError", ("number of attention heads (5)",)),
        ({"hidden_size": "wide"}, "ConfigError", ("hidden_size",)),
        ({"vocab_size": 100}, "ConfigError", ("model.config.vocab_size is 100", "raise it")),
        ({"max_position_embeddings": 8}, "ConfigError", ("data.sequence_length is 16", "max_position_embeddings")),
    ],
)
def test_a_model_that_cannot_be_made(
    here: Here, free_pool: LocalPool, tmp_path: Path, fields: dict[str, Any], error: str, texts: tuple[str, ...]
) -> None:
    job = tiny_job(tmp_path, **{"model.config": fields})
    ended = here("train", job, "--broker", free_pool.token, "--run", tmp_path / "run")
    ended.failed(2, error, *texts)


# --- operators that FusionAI does not know --------------------------------------------------------------------------


class Odd(nn.Module):
    """Uses an operator outside the vocabulary, or one inside it on elements that FusionAI does not know."""

    def __init__(self, operator: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.operator = operator

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return a scalar loss."""
        return self.operator(self.inner(features)).mean()


class Plain(nn.Module):
    """Three layers: features (B, 8) and targets (B, 8) to a loss; NaN where the features are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(self.layers(features), labels)


@pytest.mark.parametrize(
    ("operator", "texts"),
    [
        (torch.erfinv, ("aten.erfinv.default", "FusionAI does not have")),
        (lambda values: torch.fft.rfft(values).abs(), ("aten.fft_rfft.default", "complex64 is unknown", "float32")),
    ],
)
def test_an_unknown_operator_in_a_module(
    free_pool: LocalPool, tmp_path: Path, operator: Callable[[torch.Tensor], torch.Tensor], texts: tuple[str, ...]
) -> None:
    with pytest.raises(GraphError) as caught:
        fusionai.train(
            Odd(operator),
            lambda step, index: {"features": torch.ones(2, 8)},
            broker=free_pool.token,
            privacy="open",
            run=tmp_path / "run",
        )
    for text in texts:
        assert text in str(caught.value)


def test_an_unknown_operator_in_an_op_dag() -> None:
    text = encode(capture(Plain(), {"features": torch.ones(2, 8), "labels": torch.ones(2, 8)}, name="plain").graph)
    assert b"aten.tanh.default" in text
    with pytest.raises(GraphError, match=r"aten\.system\.default"):
        decode(text.replace(b"aten.tanh.default", b"aten.system.default", 1))


# --- tokens, ports, machines --------------------------------------------------------------------------------------


def forged(token: str) -> str:
    """Return a valid token of another broker, with the addresses of this one."""
    return JoinToken.issue(Identity.ephemeral(), JoinToken.decode(token).addresses).encode()


def expired(token: str) -> str:
    """Return a token whose time is over."""
    return JoinToken.issue(Identity.ephemeral(), JoinToken.decode(token).addresses, lifetime_s=1e-6).encode()


@pytest.mark.parametrize(
    ("change", "status", "error", "texts"),
    [
        (lambda token: "nonsense", 2, "TokenError", ("malformed", "copy the whole word")),
        (lambda token: token[:-6] + "AAAAAA", 2, "TokenError", ("forged", "copy it again")),
        (expired, 2, "TokenError", ("expired", "ask the broker's operator for a new one")),
        (forged, 5, "AuthenticationError", ("was to be reached",)),
    ],
)
def test_training_with_a_wrong_token(
    here: Here,
    free_pool: LocalPool,
    tmp_path: Path,
    change: Callable[[str], str],
    status: int,
    error: str,
    texts: tuple[str, ...],
) -> None:
    ended = here("train", tiny_job(tmp_path), "--broker", change(free_pool.token), "--run", tmp_path / "run")
    ended.failed(status, error, *texts)


def test_joining_with_the_token_of_another_broker(pool: LocalPool, tmp_path: Path) -> None:
    ended = run("join", forged(pool.token), "--threads", "1", "--state-dir", tmp_path, "--json")
    ended.failed(5, "AuthenticationError", "was to be reached")


def test_a_port_in_use(here: Here, free_pool: LocalPool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ended = here(
            "train", tiny_job(tmp_path), "--broker", free_pool.token, "--listen", address, "--run", tmp_path / "run"
        )
        ended.failed(2, "ConfigError", address.rpartition(":")[2], "in use")


def test_no_compnodes_and_then_too_little_memory(here: Here, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **{"model.config": {"hidden_size": 256, "intermediate_size": 512}})
    with QuickPool(0, folder=tmp_path / "empty") as empty:
        ended = here("train", job, "--broker", empty.token, "--run", tmp_path / "first")
        ended.failed(3, "PlacementError", "fusionai join TOKEN")
    with QuickPool(1, arguments=[["--memory", "1MB"]], folder=tmp_path / "small") as small:
        ended = here("train", job, "--broker", small.token, "--run", tmp_path / "second")
        ended.failed(3, "PlacementError", "compnode-1", "1 MB", "--memory")
        assert all_free(small.token, "compnode-1")


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        (None, ("data.text", "corpus.txt does not exist", "stdlib")),
        (b"", ("data.text", "corpus.txt holds no text")),
        (b" \n\n", ("data.text", "corpus.txt holds no text")),
        (b"a few words only", ("the text has", "are needed", "data.sequence_length")),
        (b"some text\n\xff\xfe\n", ("corpus.txt, line 2", "not UTF-8")),
    ],
)
def test_text_that_cannot_be_used(
    here: Here, free_pool: LocalPool, tmp_path: Path, text: bytes | None, texts: tuple[str, ...]
) -> None:
    corpus = tmp_path / "corpus.txt"
    if text is not None:
        corpus.write_bytes(text)
    job = tiny_job(tmp_path, data={"text": str(corpus)})
    here("train", job, "--broker", free_pool.token, "--run", tmp_path / "run").failed(2, "DataError", *texts)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(pool: LocalPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two checkpoints, made by a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    job = tiny_job(folder, training={"steps": 4, "checkpoint_every": 2})
    run("train", job, "--broker", pool.token, "--run", folder / "run", "--json").succeeded()
    return folder / "run"


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def newest(run_folder: Path) -> Path:
    return run_folder / "checkpoints" / "step-000004"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    """Take the last bytes of a file away."""
    path.write_bytes(path.read_bytes()[:-100])


def resume(here: Here, pool: LocalPool, run_folder: Path) -> Ended:
    return here("train", "--resume", run_folder, "--broker", pool.token, "--set", "training.steps=6")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/state.safetensors", "tokenizer.json"])
def test_a_flipped_bit_in_a_checkpoint(here: Here, free_pool: LocalPool, damaged: Path, name: str) -> None:
    flip(newest(damaged) / name)
    text = f"{newest(damaged) / name} is damaged"
    remedy = "delete that checkpoint"
    resume(here, free_pool, damaged).failed(2, "CheckpointError", text, remedy)
    if name == "model.safetensors":
        here("generate", newest(damaged), "--prompt", "alpha").failed(2, "CheckpointError", text, remedy)
        here("generate", damaged, "--prompt", "alpha").failed(2, "CheckpointError", text, remedy)
        shutil.rmtree(newest(damaged))
        assert resume(here, free_pool, damaged).succeeded()["steps"] == 4, "the remedy helps: it goes on from step 2"


@pytest.mark.parametrize("damage", ["cut short", "no manifest", "no weights"])
def test_an_incomplete_checkpoint_is_passed_over(here: Here, free_pool: LocalPool, damaged: Path, damage: str) -> None:
    weights, manifest = newest(damaged) / "model.safetensors", newest(damaged) / "fusionai.json"
    {"cut short": cut_short, "no manifest": Path.unlink, "no weights": Path.unlink}[damage](
        manifest if damage == "no manifest" else weights
    )
    if damage == "no manifest":
        cut_short(weights)  # then it is like a model that others wrote: no manifest is asked for, but whole it must be
    here("generate", newest(damaged), "--prompt", "alpha").failed(2, "CheckpointError", "model.safetensors")
    ended = resume(here, free_pool, damaged)
    assert ended.succeeded()["steps"] == 4, "it goes on from step 2"
    assert "a checkpoint is passed over" in ended.stderr


def test_no_complete_checkpoint_is_left(here: Here, free_pool: LocalPool, damaged: Path) -> None:
    for folder in (damaged / "checkpoints").iterdir():
        (folder / "fusionai.json").unlink()
    resume(here, free_pool, damaged).failed(2, "CheckpointError", f"{damaged} holds no complete checkpoint")
    here("generate", damaged.parent, "--prompt", "x").failed(2, "CheckpointError", str(damaged.parent), "no weights")
    here("generate", damaged / "none", "--prompt", "x").failed(2, "CheckpointError", "no checkpoint folder")


@pytest.mark.skipif(not POSIX, reason="needs resource limits")
def test_a_disk_that_refuses_a_checkpoint(here: Here, free_pool: LocalPool, damaged: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the system refuses the write in the same place."""
    before = newest(damaged)
    size = (before / "model.safetensors").stat().st_size
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        "from fusionai.cli.main import main\n"
        "sys.exit(main())\n"
    )
    more = ["--set", "training.steps=6"]
    arguments = ["train", "--resume", damaged, "--broker", free_pool.token, *more, "--json"]
    ended = run(*arguments, script=limited)
    ended.failed(4, "StorageError", "step-000006 cannot be written", "Free some space", f"is kept: {before}")
    assert last_job(free_pool.token).state == "failed"
    assert "cannot be written" in last_job(free_pool.token).reason
    assert latest(damaged) == before
    CheckpointReader(before).verify()
    assert sorted(path.name for path in before.parent.iterdir()) == ["step-000002", "step-000004"]
    assert here("generate", damaged, "--prompt", "alpha", "--tokens", "3").succeeded()["text"].startswith("alpha")


# --- runs that cannot go on as it is asked ---------------------------------------------------------------------------


def contents(run_folder: Path) -> dict[str, bytes]:
    """Return all files of a run but its lock."""
    files = (path for path in run_folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run_folder)): path.read_bytes() for path in files}


def test_a_refused_override_leaves_the_run_as_it_was(here: Here, free_pool: LocalPool, damaged: Path) -> None:
    before = contents(damaged)

    def resumed(*overrides: str) -> Ended:
        words = [word for override in overrides for word in ("--set", override)]
        return here("train", "--resume", damaged, "--broker", free_pool.token, "--set", "training.steps=6", *words)

    ended = resumed("data.text=other.txt", "model.config.num_hidden_layers=9")
    layers = "model.config.num_hidden_layers is 3 in the run and 9 here"
    remedy = f"begin a new run with the weights of this one and a new optimizer state: model.path = '{newest(damaged)}'"
    ended.failed(2, "ConfigError", layers, "data.text is", "and 'other.txt' here", remedy)
    resumed("training.microbatches=3").failed(2, "ConfigError", "is 2 x 2 in the run and 2 x 3 here")
    resumed("placement.compnodes=99").failed(3, "PlacementError")
    resumed("placement.machines=['nobody']").failed(3, "PlacementError", "nobody")
    resumed("training.steps=4").failed(6, "JobError", "has 4 steps done and training.steps is 4: raise training.steps")
    job = damaged.parent / "other-job.toml"
    job.write_text((damaged / "job.toml").read_text(encoding="utf-8").replace("seed = 0", "seed = 1"), encoding="utf-8")
    given = here("train", job, "--resume", damaged, "--broker", free_pool.token, "--set", "training.steps=6")
    given.failed(2, "ConfigError", "training.seed is 0 in the run and 1 here")
    here("train", job, "--run", damaged, "--broker", free_pool.token).failed(
        2, "ConfigError", f"{damaged} holds a run already", f"--resume {damaged}"
    )
    assert contents(damaged) == before
    assert resumed().succeeded()["steps"] == 2
    assert contents(damaged)["job.toml"] == before["job.toml"].replace(b"steps = 4", b"steps = 6")


def test_a_run_whose_text_is_gone(here: Here, free_pool: LocalPool, damaged: Path) -> None:
    (damaged / "data" / "text.npy").unlink()
    before = contents(damaged)
    resume(here, free_pool, damaged).failed(2, "DataError", f"is missing: {damaged / 'data' / 'text.npy'}; put it back")
    assert contents(damaged) == before


def test_a_folder_that_is_no_run(here: Here, damaged: Path) -> None:
    for wrong in (newest(damaged), newest(damaged).parent, damaged.parent):
        before = sorted(wrong.iterdir())
        ended = here("train", "--resume", wrong, "--broker", "unused")
        ended.failed(2, "ConfigError", str(wrong), "give a run folder" if wrong != newest(damaged) else f"({damaged})")
        assert sorted(wrong.iterdir()) == before


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1])
def test_a_loss_that_turns_nan(free_pool: LocalPool, tmp_path: Path, every: int) -> None:
    """The state before it is kept, whether a checkpoint was due or not."""

    def batch(step: int, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(10 * step + index)
        features = torch.randn(4, 8, generator=generator)
        if (step, index) == (3, 1):
            features[2, 5] = float("nan")
        return {"features": features, "labels": torch.ones(4, 8)}

    def train(steps: int, folder: str) -> None:
        fixed: dict[str, Any] = {"privacy": "open", "compnodes": 2, "microbatches": 2, "checkpoint_every": every}
        fusionai.train(Plain(), batch, broker=free_pool.token, steps=steps, run=tmp_path / folder, **fixed)

    with pytest.raises(JobError, match="the loss is nan at step 4; the step was not applied") as caught:
        train(6, "run")
    kept = tmp_path / "run" / "checkpoints" / "step-000003"
    assert f"step 4 of 6; the last good checkpoint is {kept}" in str(caught.value)
    assert latest(tmp_path / "run") == kept
    train(3, "good")
    ours, good = CheckpointReader(kept), CheckpointReader(tmp_path / "good" / "checkpoints" / kept.name)
    ours.verify()
    assert ours.weights
    for key in ours.weights:
        assert bytes(ours.read(key).data) == bytes(good.read(key).data), key


def test_a_learning_rate_that_is_far_too_large(here: Here, free_pool: LocalPool, tmp_path: Path) -> None:
    rate = {"steps": 9, "learning_rate": 1e30, "gradient_clip": 0.0, "checkpoint_every": 1}
    job = tiny_job(tmp_path, training=rate, schedule={"kind": "constant"})
    ended = here("train", job, "--broker", free_pool.token, "--run", tmp_path / "run")
    line = ended.failed(6, "JobError", "at step ", "Lower training.learning_rate", "the last good checkpoint is")
    kept = latest(tmp_path / "run")
    assert kept is not None
    assert str(kept) in line
    CheckpointReader(kept).verify()
    steps = [json.loads(text)["step"] for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"(step {steps[-1] + 1} of 9" in line
    assert kept.name == f"step-{steps[-1]:06d}"
    assert last_job(free_pool.token).state == "failed"
