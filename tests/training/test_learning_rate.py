"""Learning-rate schedules equal torch's own, step by step."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from fusionai.errors import ConfigError
from fusionai.training.learning_rate import ScheduleConfig, learning_rate

BASE = 3e-3


def torch_rates(schedule: ScheduleConfig, total_steps: int) -> list[float]:
    """The rates that torch's schedulers give for the same schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    rest = total_steps - schedule.warmup_steps
    main: LRScheduler
    if schedule.kind == "cosine":
        main = CosineAnnealingLR(optimizer, rest, eta_min=BASE * schedule.minimum_ratio)
    elif schedule.kind == "linear":
        main = LinearLR(optimizer, 1.0, end_factor=schedule.minimum_ratio, total_iters=rest)
    else:
        main = LambdaLR(optimizer, lambda _: 1.0)
    scheduler: LRScheduler = main
    if schedule.warmup_steps:
        start = 1 / (schedule.warmup_steps + 1)
        warmup = LinearLR(optimizer, start, total_iters=schedule.warmup_steps)
        scheduler = SequentialLR(optimizer, [warmup, main], [schedule.warmup_steps])
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup_steps", "minimum_ratio"), [(0, 0.1), (7, 0.0), (1, 0.5)])
def test_equals_torch(kind: str, warmup_steps: int, minimum_ratio: float) -> None:
    fields = {"kind": kind, "warmup_steps": warmup_steps, "minimum_ratio": minimum_ratio}
    schedule = msgspec.convert(fields, ScheduleConfig)
    total_steps = 40
    ours = [learning_rate(schedule, BASE, step, total_steps) for step in range(total_steps)]
    assert ours == pytest.approx(torch_rates(schedule, total_steps), rel=1e-9)


def test_stays_at_the_minimum_past_the_end() -> None:
    schedule = ScheduleConfig(kind="linear", minimum_ratio=0.25)
    assert learning_rate(schedule, 1.0, 500, 100) == 0.25


@pytest.mark.parametrize("total_steps", [0, 1, 5, 10])
def test_a_run_no_longer_than_its_warmup(total_steps: int) -> None:
    schedule = ScheduleConfig(warmup_steps=10)
    rates = [learning_rate(schedule, BASE, step, total_steps) for step in range(12)]
    assert all(0 < rate <= BASE for rate in rates)
    assert rates[0] == pytest.approx(BASE / 11)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"warmup_steps": -1}, "schedule.warmup_steps"),
        ({"minimum_ratio": 1.5}, "schedule.minimum_ratio"),
        ({"minimum_ratio": math.nan}, "schedule.minimum_ratio"),
    ],
)
def test_errors_name_the_field(fields: dict[str, float], names: str) -> None:
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        msgspec.convert(fields, ScheduleConfig)
