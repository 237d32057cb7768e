"""Reports of rounds, as a compnode may forge them, and the memory that a round's ledger takes."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
from msgspec.structs import replace

from fusionai.graph.model import Input, SubDag, TensorType, ValueName, Weight, WeightKey
from fusionai.pool.identifiers import FIRST_EPOCH, JobId
from fusionai.training.ledger import RoundLedger
from fusionai.training.messages import RoundReport
from fusionai.training.reports import flaw, printable, total

NAMES = [ValueName(f"x{number}") for number in range(40)]
LAST = SubDag(
    1,
    {},
    tuple(Input(name, TensorType("float32", (2,)), "data", False) for name in NAMES),
    (Weight(ValueName("w"), WeightKey("w"), TensorType("float32", (2,)), "parameter", True),),
    (),
    {},
    (),
    (),
    ValueName("loss"),
)
FIRST = replace(LAST, index=0, loss=None)
GOOD = RoundReport(JobId("j"), FIRST_EPOCH, 0, {}, {WeightKey("w"): 1.5}, 0.1, 0.2, {"b": 8}, 1000, {0: 0.1}, {0: 0.2})


def test_honest_reports() -> None:
    assert flaw(GOOD, [FIRST], 2, {"a", "b"}) is None
    losses = {0: 0.5, 1: math.nan}
    with_losses = replace(GOOD, losses=losses, norms={"w": math.inf}, forward_s={1: 1.0}, backward_s={})
    assert flaw(with_losses, [LAST], 2, {"a", "b"}) is None, "a job's own trouble is no lie"


@pytest.mark.parametrize(
    "lie",
    [
        {"losses": {0: math.nan}},
        {"norms": {"w": -1.0}},
        {"norms": {"another's": 1.0}},
        {"busy_s": math.nan},
        {"wall_s": -1.0},
        {"forward_s": {7: 1.0}},
        {"backward_s": {0: math.inf}},
        {"bytes_sent": {"stranger": 1}},
        {"bytes_sent": {"b": -1}},
        {"memory_bytes": 1 << 62},
    ],
)
def test_lies(lie: dict[str, Any]) -> None:
    assert flaw(replace(GOOD, **lie), [FIRST], 2, {"a", "b"}) is not None


def test_losses_must_be_all_there() -> None:
    report = replace(GOOD, losses={0: 1.0, 2: 1.0}, forward_s={}, backward_s={})
    assert flaw(report, [LAST], 2, {"a", "b"}) == "losses of 2 microbatches, where 2 are due"


def test_totals_never_raise() -> None:
    assert total([0.1] * 10) == 1.0
    assert math.isnan(total([1e308, 1e308]))
    assert math.isnan(total([math.inf, -math.inf]))


def test_texts_for_terminals() -> None:
    assert printable("a\x1b[2Jb\r\nc") == "a [2Jb  c"
    assert len(printable("x" * 10_000)) == 2000


def test_a_ledger_of_many_microbatches_is_small() -> None:
    tracemalloc.start()
    ledger = RoundLedger([LAST], 65_536, {1: 65_536}, train=True)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not ledger.complete
    assert peak_bytes < 64 << 20
