"""Weights that stages of one machine share: counted once, and what waits of their gradients."""

from __future__ import annotations

from decoder_graph import decoder

from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.model import SubDag
from fusionai.graph.shared_weights import MOST_WAITING_BYTES, Repeated, repeated, waiting_bytes
from fusionai.graph.sizes import type_bytes

TABLE_BYTES = 256 * 64 * 4
"""The embedding's, which is the head's weight too."""


def all_bytes(subdag: SubDag) -> int:
    return sum(type_bytes(each.type, {}) for each in subdag.weights)


def test_a_tied_weight_counts_once_a_machine() -> None:
    graph = decoder(3, tied=True)
    points = cut_points(graph, {"b": 2, "t": 8})
    first, middle, last = cut(graph, [points[1], points[-2]])
    none = Repeated()
    table = Repeated(trainable=TABLE_BYTES)
    assert repeated([first, middle, last], "aba") == [none, none, table]
    assert repeated([first, middle, last], "abc") == [none, none, none]
    # A second pipeline that the same machine drives.
    assert repeated([first, middle, last, first, middle, last], "abaaca") == [
        none,
        none,
        table,
        Repeated(trainable=all_bytes(first)),
        none,
        Repeated(trainable=all_bytes(last)),
    ]
    untied = cut(decoder(3), [points[1], points[-2]])
    assert repeated(untied, "aba") == [none, none, none]


def test_gradients_wait_for_each_microbatch_under_way() -> None:
    graph = decoder(3, tied=True)
    points = cut_points(graph, {"b": 2, "t": 8})
    first, middle, last = cut(graph, [points[1], points[-2]])
    assert waiting_bytes([first, last], [3, 1]) == 3 * TABLE_BYTES
    assert waiting_bytes([first, middle], [3, 2]) == 0
    assert waiting_bytes([first, last], [10**6, 1]) == MOST_WAITING_BYTES
