"""What a plane says about its devices and abilities, and what it measures, on every plane."""

from __future__ import annotations

import psutil
import pytest
from small_graphs import cut, language_model_graph, language_model_weights

from fusionai.errors import ConfigError
from fusionai.execution.plane import Plane, ProgramOptions
from fusionai.execution.planes import available_planes
from fusionai.execution.sessions import SessionLimits
from fusionai.graph.abilities import PlaneAbilities
from fusionai.graph.vocabulary import FLOP_CLASSES, VOCABULARY
from fusionai.tensor import ITEM_BYTES


def test_devices(any_plane: Plane) -> None:
    assert any_plane.name in available_planes()
    assert any_plane.devices()[-1] == "cpu"
    assert len(any_plane.describe("cpu")) > 2
    assert any_plane.device_memory_bytes("cpu") == psutil.virtual_memory().total
    with pytest.raises(ConfigError, match="usable: "):
        any_plane.describe("tpu")


def test_abilities(any_plane: Plane) -> None:
    found = any_plane.abilities("cpu")
    assert found.plane == any_plane.name
    assert list(found.operators) == sorted(set(found.operators))
    assert set(found.operators) <= VOCABULARY.keys()
    assert set(found.dtypes) <= ITEM_BYTES.keys()
    assert found.training or found.decoding
    with pytest.raises(ConfigError, match="usable: "):
        any_plane.abilities("tpu")


def test_a_plane_loads_what_it_says_it_can_run(any_plane: Plane) -> None:
    """And refuses the rest: an ability that is declared and not there would be found out in the middle of a job."""
    subdags = cut(language_model_graph(language_model_weights()), [12])
    abilities: PlaneAbilities = any_plane.abilities("cpu")
    if abilities.training:
        any_plane.load(subdags, ProgramOptions()).close()
    else:
        with pytest.raises(ConfigError, match=f"{any_plane.name!r} does not train"):
            any_plane.load(subdags, ProgramOptions())
    limits = SessionLimits(cache_bytes=1 << 20, sessions=2)
    if abilities.decoding:
        any_plane.load_sessions(subdags, ProgramOptions(), limits).close()
    else:
        with pytest.raises(ConfigError, match=f"{any_plane.name!r} does not decode"):
            any_plane.load_sessions(subdags, ProgramOptions(), limits)


def test_session_limits_are_positive() -> None:
    with pytest.raises(ConfigError, match="cache_bytes must be at least 1, got 0"):
        SessionLimits(cache_bytes=0, sessions=1)


def test_calibration_is_plausible(any_plane: Plane) -> None:
    """A machine that is busy for a moment spoils a measurement, so it may be repeated; the bounds are the same."""
    flaws: list[str] = []
    for _ in range(3):
        found = any_plane.calibrate("cpu", seconds=0.5)
        assert {name.removesuffix(".bf16") for name in found.flops_per_s} == set(FLOP_CLASSES)
        plausible = (
            all(1e8 < value < 1e15 for value in found.flops_per_s.values())
            and 1e8 < found.memory_bytes_per_s < 1e13
            and 1e-7 < found.overhead_s < 1e-2
        )
        if plausible:
            return
        flaws.append(str(found))
    pytest.fail("; ".join(flaws))
