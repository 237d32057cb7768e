"""Shares and rosters: who may send what, and which roster replaces which."""

from __future__ import annotations

import pytest
from decoder_graph import SIZES, decoder
from msgspec.structs import replace

from fusionai.errors import ProtocolError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.model import ValueName, WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.contacts import Contact
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId
from fusionai.training.boundaries import check_source
from fusionai.training.messages import Boundary
from fusionai.training.roster import DRIVER, Roster
from fusionai.training.share import Share

OWNER, DRIVING, A, B, C = (PeerId(letter * 64) for letter in "0dabc")
KEY = WeightKey("tied")


def contact(peer: PeerId) -> Contact:
    return Contact(peer=peer, name=peer[:1], addresses=("127.0.0.1:1",), dial=True)


ROSTER = Roster(
    job=JobId("j"),
    epoch=Epoch(2),
    owner=OWNER,
    driver=DRIVING,
    pipelines=((A, B, A),),
    sums={KEY: (A, B), WeightKey("other"): (B, A)},
    neighbours=(contact(A), contact(DRIVING)),
    handing=(contact(C),),
)
"""As the machine B knows it."""


def test_who_holds_what() -> None:
    assert ROSTER.plan == JobEpoch(JobId("j"), Epoch(2))
    assert ROSTER.stages == 3
    assert [ROSTER.holder(stage) for stage in (-1, 0, 1, 2, 3)] == [None, A, B, A, None]
    assert ROSTER.holder(0, pipeline=1) is None
    two = replace(ROSTER, pipelines=((A, B), (C,)))
    assert (two.holder(0, 1), two.holder(1, 1), two.stages) == (C, None, 2)
    assert replace(ROSTER, pipelines=()).stages == 0


def test_the_driver_is_a_role_of_its_own() -> None:
    assert ROSTER.is_driver(DRIVING)
    assert not ROSTER.is_driver(OWNER)
    assert ROSTER.sender(DRIVER) == DRIVING
    assert ROSTER.sender(1) == B


def test_who_sums_gradients_and_reports_norms() -> None:
    assert ROSTER.sums_with(A, KEY)
    assert not ROSTER.sums_with(C, KEY)
    assert not ROSTER.sums_with(A, WeightKey("untied"))
    assert ROSTER.answered_elsewhere(B) == [KEY]


def test_whom_to_link_with() -> None:
    assert [each.peer for each in ROSTER.contacts] == [A, DRIVING, C]
    assert [ROSTER.knows(peer) for peer in (A, DRIVING, C, OWNER)] == [True, True, True, False]
    assert ROSTER.neighbour(A) == contact(A)
    assert ROSTER.neighbour(C) is None, "weights only: its loss is no loss of a neighbour"


@pytest.mark.parametrize(
    ("epoch", "job", "follows"), [(3, "j", True), (2, "j", False), (1, "j", False), (3, "k", False)]
)
def test_which_roster_replaces_which(epoch: int, job: str, follows: bool) -> None:
    assert replace(ROSTER, job=JobId(job), epoch=Epoch(epoch)).follows(ROSTER) == follows


@pytest.mark.parametrize(("source", "peer", "error"), [
    (0, A, None),
    (1, B, None),
    (DRIVER, DRIVING, None),
    (DRIVER, OWNER, "came from 0000"),
    (0, B, "which has other stages"),
    (3, A, "stage 3 does not exist; the job has 3"),
    (-2, A, "does not exist"),
])  # fmt: skip
def test_a_tensor_comes_from_the_machine_that_has_its_stage(source: int, peer: PeerId, error: str | None) -> None:
    header = Boundary(JobId("j"), Epoch(2), 0, 0, ValueName("h"), source, 1, False, "float32", (2, 8))
    if error is None:
        check_source(ROSTER, peer, header)
    else:
        with pytest.raises(ProtocolError, match=error):
            check_source(ROSTER, peer, header)


def test_a_share_knows_its_stages_and_weights() -> None:
    graph = decoder(3, tied=True)
    points = cut_points(graph, SIZES)
    first, middle, last = cut(graph, [points[1], points[-2]])
    share = Share(JobId("j"), (first, last), {0: 1, 2: 1}, ProgramOptions(), 0)
    assert share.subdag(2) == last
    assert share.subdag(middle.index) is None
    weights = share.weights()
    assert weights.keys() == {weight.key for subdag in (first, last) for weight in subdag.weights}
    assert len(weights) < len(first.weights) + len(last.weights), "the tied table is there once"
