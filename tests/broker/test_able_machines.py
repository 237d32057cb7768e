"""Machines whose planes cannot run a model are left out of its plan, and named."""

from __future__ import annotations

from typing import Any

import pytest
from decoder_graph import decoder
from msgspec.structs import replace

from fusionai.broker.able_machines import able, obstacles, unable_lines
from fusionai.broker.records import MemberRecord
from fusionai.errors import PlacementError
from fusionai.graph.abilities import PlaneAbilities
from fusionai.network.identity import PeerId
from fusionai.scheduling.profile import DeviceProfile

GRAPH = decoder(layers=2)
EVERYTHING = PlaneAbilities(
    plane="torch",
    operators=tuple(sorted({node.op for node in GRAPH.nodes})),
    dtypes=("float32", "int64", "bool"),
    training=True,
    decoding=False,
)


def member(name: str, abilities: PlaneAbilities | None) -> MemberRecord:
    rates: dict[str, Any] = {"flops_per_s": {"matmul": 1e9}, "memory_bytes_per_s": 1e9, "overhead_s": 1e-5}
    device = DeviceProfile("card", "cpu", "torch", "1", 1 << 30, 1, abilities=abilities, **rates)
    return MemberRecord(
        peer=PeerId(name * 8),
        name=name,
        role="compnode",
        state="idle",
        device=device,
        addresses=(),
        lab=False,
        seen_s=0.0,
    )


def test_machines_that_lack_something_are_named() -> None:
    missing = GRAPH.nodes[3].op
    fewer = replace(EVERYTHING, plane="onnx", operators=tuple(op for op in EVERYTHING.operators if op != missing))
    members = [
        member("a", EVERYTHING),
        member("b", fewer),
        member("c", replace(EVERYTHING, plane="onnx", training=False)),
        member("d", None),
    ]
    found = obstacles(GRAPH, 0, len(GRAPH.nodes), members)
    assert found.keys() == {"b", "c"}
    assert missing in found["b"]
    assert "does not train" in found["c"]
    assert [each.name for each in able(members, found)] == ["a", "d"]
    assert unable_lines(found)[0].startswith("b is left out: its plane 'onnx' lacks the operators")


def test_only_what_is_distributed_counts() -> None:
    """An operator that stays with the owner may be missing elsewhere."""
    first = GRAPH.nodes[0].op
    assert all(node.op != first for node in GRAPH.nodes[1:])
    fewer = replace(EVERYTHING, operators=tuple(op for op in EVERYTHING.operators if op != first))
    assert obstacles(GRAPH, 1, len(GRAPH.nodes), [member("a", fewer)]) == {}
    assert obstacles(GRAPH, 0, len(GRAPH.nodes), [member("a", fewer)]).keys() == {"a"}


def test_nobody_can() -> None:
    members = [member(name, replace(EVERYTHING, training=False)) for name in "ab"]
    found = obstacles(GRAPH, 0, len(GRAPH.nodes), members)
    with pytest.raises(PlacementError, match=r"no free compnode can run this model: a cannot.*and 1 others cannot"):
        able(members, found)


def test_nothing_is_left_for_compnodes() -> None:
    last = len(GRAPH.nodes)
    with pytest.raises(PlacementError, match="no operator is left for compnodes"):
        obstacles(GRAPH, last, last, [member("a", EVERYTHING)])


def test_a_plan_names_a_few_of_many() -> None:
    lines = unable_lines({f"machine-{number}": "its plane does not train" for number in range(20_000)})
    assert len(lines) == 9
    assert lines[-1].startswith("19992 more machines")
