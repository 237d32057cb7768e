"""What a share of a job takes of its machine, reckoned by the machine itself."""

from __future__ import annotations

import pytest
from decoder_graph import SIZES, decoder
from toy_pipelines import Layer, chain, evaluating_by

from fusionai.errors import JobError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.evaluation import face
from fusionai.graph.model import SubDag
from fusionai.pool.identifiers import JobId
from fusionai.training.admission import check_round, check_weights
from fusionai.training.share import Share

TABLE_BYTES = 256 * 64 * 4


def test_a_weight_of_two_stages_is_counted_once() -> None:
    graph = decoder(3, tied=True)
    points = cut_points(graph, SIZES)
    first, _, last = cut(graph, [points[1], points[-2]])
    costs = [stage_cost(each, SIZES) for each in (first, last)]
    need = sum(each.training_bytes(1, 2) - each.transient_bytes for each in costs)
    need += max(each.transient_bytes for each in costs) - 4 * TABLE_BYTES
    share = share_of(first, last)
    check_round(share, SIZES, train=True, limit_bytes=need)
    with pytest.raises(JobError, match=f"takes {need:,} bytes, but this machine offers {need - 1:,}"):
        check_round(share, SIZES, train=True, limit_bytes=need - 1)


def test_weights_alone_are_checked_before_any_round() -> None:
    (whole,) = cut(decoder(3, tied=True), [])
    need = 4 * stage_cost(whole, SIZES).trainable_bytes
    check_weights(share_of(whole), need)
    with pytest.raises(JobError, match="use smaller batches or more compnodes"):
        check_weights(share_of(whole), need - 1)


def share_of(*subdags: SubDag) -> Share:
    return Share(
        job=JobId("job"),
        subdags=subdags,
        in_flight={each.index: 1 for each in subdags},
        options=ProgramOptions(),
        memory_bytes=0,
    )


def test_an_evaluation_is_admitted_by_what_it_runs() -> None:
    """Its own graph keeps an early value until the end, and reads a weight that training does not."""
    layers = [Layer("one"), Layer("two"), Layer("three")]
    graph = evaluating_by(chain(layers), chain([*layers, Layer("further", skip=1)]))
    (whole,) = cut(graph, [])
    evaluation, training = (stage_cost(face(whole, train), {"s0": 64}) for train in (False, True))
    assert evaluation.transient_bytes != training.transient_bytes
    assert evaluation.weight_bytes == training.weight_bytes == 4 * 3 * 8
    need = evaluation.training_bytes(0, 2)
    share = share_of(whole)
    check_round(share, {"s0": 64}, train=False, limit_bytes=need)
    with pytest.raises(JobError, match=f"takes {need:,} bytes"):
        check_round(share, {"s0": 64}, train=False, limit_bytes=need - 1)
