"""From plans to assignments."""

from __future__ import annotations

import pytest
from broker_pool import graph, profile
from msgspec.structs import replace

from fusionai.broker.assigning import assignments
from fusionai.broker.link_book import LinkBook
from fusionai.broker.records import MemberRecord
from fusionai.errors import FusionError, PlacementError, ProtocolError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.capture import capture
from fusionai.graph.cuts import cut
from fusionai.graph.model import OpDag, WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId
from fusionai.scheduling.plan import PipelinePlan, Plan, StagePlan, StagePrediction
from fusionai.training.assignment_parcels import Assignment, pack, unpack
from two_faced_models import ROLES, Skipping
from two_faced_models import batch as tokens

OWNER, A, B, C = (PeerId(letter * 64) for letter in "0abc")


def record(peer: PeerId, *, addresses: tuple[str, ...] = ("127.0.0.1:1",), device: str = "cpu") -> MemberRecord:
    return MemberRecord(
        peer=peer, name=peer[:1], role="compnode", state="idle", device=replace(profile(), device=device),
        addresses=addresses, lab=False, seen_s=0,
    )  # fmt: skip


def shares(
    dag: OpDag, peers: list[PeerId], cuts: list[int], members: list[MemberRecord], *, driver: PeerId = OWNER
) -> dict[PeerId, Assignment]:
    bounds = [0, *cuts, len(dag.nodes)]
    predicted = StagePrediction(0, 0, 0, 1000, 0)
    stages = tuple(
        StagePlan(number, peer, bounds[number], bounds[number + 1], 2, predicted) for number, peer in enumerate(peers)
    )
    plan = Plan("", {"s0": 2}, 2, "open", OWNER, (PipelinePlan(stages, 2, 0.0),), 0.0, 0.0, "")
    by_peer = {each.peer: each for each in members}
    return assignments(
        JobEpoch(JobId("j"), Epoch(3)),
        plan,
        cut(dag, cuts),
        members=by_peer,
        owner=OWNER,
        driver=driver,
        links=LinkBook(lambda _: None),
        options=ProgramOptions(device="cuda:0"),
    )


def test_neighbours_and_stages() -> None:
    members = [record(OWNER, addresses=()), record(A), record(B, device="mps")]
    found = shares(graph(), [OWNER, A, B, OWNER], [1, 2, 3], members)
    assert {peer: [each.index for each in given.share.subdags] for peer, given in found.items()} == {
        OWNER: [0, 3],
        A: [1],
        B: [2],
    }
    around = {peer: {(each.name, each.dial) for each in given.roster.neighbours} for peer, given in found.items()}
    assert around == {
        OWNER: {("a", True), ("b", True)},
        A: {("0", False), ("b", True)},
        B: {("0", False), ("a", False)},
    }
    assert {peer: given.share.options.device for peer, given in found.items()} == {OWNER: "cuda:0", A: "cpu", B: "mps"}
    assert found[OWNER].share.memory_bytes == 2000
    assert found[OWNER].share.in_flight == {0: 2, 3: 2}
    assert all(given.roster.pipelines == ((OWNER, A, B, OWNER),) for given in found.values())


def test_an_owner_without_stages_still_has_neighbours() -> None:
    found = shares(graph(), [A, B], [2], [record(OWNER), record(A), record(B)])
    assert found[OWNER].share.subdags == ()
    assert {each.name for each in found[OWNER].roster.neighbours} == {"a", "b"}


def test_tied_weights_name_all_holders_lowest_stage_first() -> None:
    dag = graph()
    tied = tuple(replace(each, key=WeightKey("tied")) if each.name in ("w0", "w3") else each for each in dag.weights)
    found = shares(replace(dag, weights=tied), [B, A, A], [1, 3], [record(OWNER), record(A), record(B)])
    assert found[A].roster.sums == found[B].roster.sums == {"tied": (B, A)}
    assert shares(dag, [B, A, A], [1, 3], [record(OWNER), record(A), record(B)])[A].roster.sums == {}
    assert shares(replace(dag, weights=tied), [A, A], [2], [record(OWNER), record(A)])[A].roster.sums == {}


def test_nobody_can_dial() -> None:
    with pytest.raises(PlacementError, match=r"0 and a .*--listen"):
        shares(graph(), [A, B], [2], [record(OWNER, addresses=()), record(A, addresses=()), record(B)])


def test_a_driver_that_is_not_the_owner() -> None:
    """It is linked with every machine; the owner, who holds nothing, is no part of the job's traffic."""
    members = [record(OWNER), record(A), record(B)]
    found = shares(graph(), [A, B], [2], members, driver=B)
    assert found.keys() == {A, B}
    assert {peer: {each.name for each in given.roster.neighbours} for peer, given in found.items()} == {
        A: {"b"},
        B: {"a"},
    }
    assert all((given.roster.owner, given.roster.driver) == (OWNER, B) for given in found.values())


def test_packing_keeps_everything_and_checks() -> None:
    given = shares(graph(), [A, B], [2], [record(OWNER), record(A), record(B)])[A]
    share, roster = given.share, given.roster
    packed = pack(given)
    assert unpack(packed) == given
    assert given.plan == JobEpoch(JobId("j"), Epoch(3))
    with pytest.raises(ProtocolError, match="malformed"):
        unpack(packed[:-5])
    with pytest.raises(ProtocolError, match="no place"):
        unpack(pack(Assignment(replace(share, in_flight={}), roster)))
    with pytest.raises(ProtocolError, match="no place"):
        unpack(pack(Assignment(share, replace(roster, pipelines=()))))
    with pytest.raises(ProtocolError, match="nobody holds"):
        unpack(pack(Assignment(share, replace(roster, sums={WeightKey("w"): ()}))))
    node = share.subdags[0].nodes[0]
    evil = replace(share.subdags[0], nodes=(replace(node, op="aten.from_file.default"), *share.subdags[0].nodes[1:]))
    with pytest.raises(FusionError, match="from_file"):
        unpack(pack(Assignment(replace(share, subdags=(evil,)), roster)))


def test_machines_that_only_evaluation_connects_are_neighbours() -> None:
    dag = capture(Skipping(), tokens(0), roles=ROLES, validate_values=False).graph  # type: ignore[arg-type]
    linears = [place for place, node in enumerate(dag.nodes) if node.op == "aten.linear.default"]
    members = [record(OWNER), record(A), record(B), record(C)]
    cuts = [linears[1], linears[2], linears[4]]
    found = shares(dag, [A, B, C, OWNER], cuts, members)
    alone = shares(replace(dag, evaluation=None), [A, B, C, OWNER], cuts, members)

    def around(given: dict[PeerId, Assignment], peer: PeerId) -> set[str]:
        return {each.name for each in given[peer].roster.neighbours}

    assert around(alone, A) == {"0", "b"}
    # The first layer's output, which evaluation adds at the end, goes straight to where it is added.
    assert around(found, A) == {"0", "b", "c"}
    for given in found.values():
        assert unpack(pack(given)) == given
    stage = found[A].share.subdags[0]
    own = stage.evaluation
    assert own is not None
    far = replace(own.sends[0], target=9)
    bad = replace(
        found[A], share=replace(found[A].share, subdags=(replace(stage, evaluation=replace(own, sends=(far,))),))
    )
    with pytest.raises(ProtocolError, match="to or from a stage that does not exist"):
        unpack(pack(bad))
