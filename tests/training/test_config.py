"""Job files: what is wrong is named with its field; what is right round-trips."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusionai.errors import ConfigError
from fusionai.training.config import parse_job, read_job, to_toml

GOOD = """
name = "tiny"
[model.config]
model_type = "llama"
hidden_size = 64
[training]
steps = 5
"""


def test_round_trip_writes_every_default_out() -> None:
    job = parse_job(GOOD)
    text = to_toml(job)
    assert parse_job(text) == job
    assert "gradient_clip = 1.0" in text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("name = ", "TOML"),
        (GOOD + "stepz = 3", "stepz"),
        (GOOD.replace("steps = 5", "steps = 0"), "training.steps"),
        (GOOD.replace("steps = 5", 'steps = "many"'), "training.steps"),
        (GOOD.replace("steps = 5", 'precision = "fp8"'), "training.precision"),
        (GOOD.replace("steps = 5", "learning_rate = -1.0"), "training.learning_rate"),
        (GOOD.replace("steps = 5", "learning_rate = nan"), "training.learning_rate"),
        (GOOD + '[model]\npath = "x"\n', "model"),
        ('name = "x"\n[model]\n', "model.path"),
        ('name = "x"\n[model.config]\nhidden_size = 3\n', "model_type"),
        (
            'name = "x"\n[model.config]\nmodel_type = "gpt2"\nn_layer = 0\n',
            "model.config.n_layer must be at least 1, got 0",
        ),
        ('name = "../x"\n[model]\npath = "y"\n', "name"),
        (GOOD + '[placement]\nprivacy = "secret"\n', "privacy"),
        (GOOD + "[placement]\ncuts = [5, 3]\n", "placement.cuts"),
        (GOOD + '[placement]\nmachines = ["a", "a"]\n', "placement.machines"),
        (GOOD + '[placement]\ncuts = [3]\nmachines = ["a"]\n', "placement.machines"),
        (GOOD + '[optimizer]\nkind = "lion"\n', "optimizer.kind"),
        (GOOD + "[optimizer]\nbeta1 = 1.5\n", "optimizer.beta1"),
        (GOOD + "[optimizer]\nepsilon = nan\n", "optimizer.epsilon"),
        (GOOD + "[optimizer]\nweight_decay = inf\n", "optimizer.weight_decay"),
        (GOOD + '[data]\ntext = ""\n', "data.text"),
        (GOOD.replace("steps = 5", f"seed = {1 << 63}"), "training.seed"),
        # What would have been right is told too.
        (GOOD.replace("steps = 5", 'precision = "fp8"'), "fp32, bf16"),
        (GOOD + "stepz = 3", "steps, batch_size"),
        (GOOD + "[optimisation]\n", "optimizer, schedule"),
    ],
)
def test_errors_name_the_field(text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        parse_job(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_job(tmp_path / "job.toml")
