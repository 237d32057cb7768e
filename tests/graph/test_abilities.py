"""A machine is refused what its plane cannot run, and the error says what is missing."""

from __future__ import annotations

import pytest
from msgspec import json
from msgspec.structs import replace

from fusionai.errors import PlacementError
from fusionai.execution.calibration.reference_graph import DecoderShape, reference_stage
from fusionai.graph.abilities import PlaneAbilities, check_can_run

STAGE = reference_stage(DecoderShape(layers=1, hidden=8, inner=8, heads=2, vocabulary=16, batch=1, tokens=4))
USED = tuple(sorted({node.op for node in STAGE.nodes}))
ENOUGH = PlaneAbilities(plane="p", operators=USED, dtypes=("float32", "int64"), training=True, decoding=False)


def test_what_suffices_passes() -> None:
    check_can_run("tower", ENOUGH, [STAGE], "training")


def test_a_missing_operator_is_named_with_the_machine() -> None:
    lacking = replace(ENOUGH, operators=tuple(name for name in USED if name != "fusion.attention"))
    assert lacking.lacking(STAGE) == ("fusion.attention",)
    with pytest.raises(PlacementError, match=r"'tower' cannot run stage 1: .*'p' lacks the operators fusion\.att"):
        check_can_run("tower", lacking, [STAGE], "training")


def test_many_missing_operators_are_counted() -> None:
    with pytest.raises(PlacementError, match=rf"and {len(USED) - 5} more; give"):
        check_can_run("tower", replace(ENOUGH, operators=()), [STAGE], "training")


def test_dtypes_and_kinds_of_work() -> None:
    assert replace(ENOUGH, dtypes=("float32",)).obstacle(STAGE, "training") == "its plane 'p' does not compute in int64"
    assert ENOUGH.obstacle(STAGE, "decoding") == "its plane 'p' does not decode"
    assert replace(ENOUGH, training=False).obstacle(STAGE, "training") == "its plane 'p' does not train"
    assert replace(ENOUGH, decoding=True).obstacle(STAGE, "decoding") is None


def test_abilities_travel() -> None:
    assert json.decode(json.encode(ENOUGH), type=PlaneAbilities) == ENOUGH
