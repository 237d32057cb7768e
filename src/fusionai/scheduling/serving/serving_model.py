"""What a captured decoder costs while it serves, as a line of segments: embedding, blocks, head.

Array suffixes: S = segments, P = S + 1 positions between and around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusionai.errors import GraphError
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import crossing_bytes, cut, cut_points
from fusionai.graph.encoding import content_hash
from fusionai.graph.model import Node, OpDag, Ref, Sizes
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.links import Floats

ATTENTION = "fusion.attention"

TOKEN_BYTES = 8.0
"""A token's number, as it travels between the gateway and the machines that embed and sample: int64."""

_SAME = 1.001
"""Positions whose bytes differ by less than this cross with the same tensors."""

_PROBE_TOKENS = 64
"""Length of the sequence for which crossing tensors are compared; any length does."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingModel:
    """A decoder as segments that machines may hold, and what each costs. All bytes and FLOPs are of one token.

    Segment 0 is what comes before the first block (the embedding), the last is what comes after the last block's norm
    (the head), and each between holds one attention: a decoder block.
    """

    name: str
    graph_hash: str
    positions: tuple[int, ...]
    """P node positions in the OP-DAG, rising from 0 to its length."""
    weight_bytes_S: Floats
    """Held. Tied weights count in every segment that reads them."""
    read_bytes_S: Floats
    """The part of them that is read in every pass: products read all of their weights, a look-up next to nothing."""
    flops_S: Floats
    """FLOPs of products."""
    attention_flops_S: Floats
    """For each token attended to."""
    moved_bytes_S: Floats
    """By operators that are not counted in FLOPs."""
    kv_bytes_S: Floats
    """Kept in the cache for each token of a sequence."""
    operators_S: Floats
    last_only_S: Floats
    """1 where a prompt needs only its last token (the head), 0 elsewhere."""
    crossing_bytes_P: Floats
    """From machine to machine at a position; at both ends a token's number, from or to the gateway."""

    @property
    def blocks(self) -> int:
        """Return the number of decoder blocks."""
        return len(self.flops_S) - 2

    def sums(self, values_S: Floats) -> Floats:
        """Return the (P, P) table of sums over [start, stop); 0 where it is empty."""
        total = np.concatenate([[0.0], np.cumsum(values_S)])
        return np.maximum(np.asarray(total[None] - total[:, None], dtype=np.float64), 0.0)


def serving_model(graph: OpDag, sizes: Callable[[int, int], Sizes]) -> ServingModel:
    """Cost a captured decoder for serving. Blocks for seconds with a large model.

    FLOPs and bytes are those of `graph.cost` at one token, and what they gain with a second one.

    Args:
        graph: a causal language model's, with `fusion.attention`.
        sizes: the numbers for the graph's symbols, of so many sequences of so many tokens.

    Raises:
        GraphError: the graph has no attention, or cannot be cut around its blocks with one tensor crossing.
    """
    positions = _positions(graph, sizes)
    subdags = cut(graph, positions[1:-1])
    one, two = ([stage_cost(each, sizes(1, tokens)) for each in subdags] for tokens in (1, 2))
    flops = _array([cost.forward_flops.get("matmul", 0) for cost in one])
    weights = _array([cost.weight_bytes for cost in one])
    crossing = _array([crossing_bytes(graph, sizes(1, 1))[position] for position in positions])
    crossing[0] = crossing[-1] = TOKEN_BYTES
    last = len(one) - 1
    return ServingModel(
        name=graph.name,
        graph_hash=content_hash(graph),
        positions=positions,
        weight_bytes_S=weights,
        read_bytes_S=np.where(flops > 0, weights, 0.0),
        flops_S=flops,
        attention_flops_S=_array([cost.forward_flops.get("attention", 0) for cost in one]),
        moved_bytes_S=_array(
            [later.forward_bytes - earlier.forward_bytes for earlier, later in zip(one, two, strict=True)]
        ),
        kv_bytes_S=_array([_kv_bytes(graph, subdag.nodes, sizes(1, 1)) for subdag in subdags]),
        operators_S=_array([cost.operators for cost in one]),
        last_only_S=_array([index == last for index in range(len(one))]),
        crossing_bytes_P=crossing,
    )


def _positions(graph: OpDag, sizes: Callable[[int, int], Sizes]) -> tuple[int, ...]:
    """Return the ends of the embedding, of each block, and of the head."""
    attentions = [place for place, node in enumerate(graph.nodes) if node.op == ATTENTION]
    if not attentions:
        raise GraphError(
            f"{graph.name!r} has no {ATTENTION} operator, so it cannot generate tokens one by one; capture a causal "
            "language model with fusionai.graph.capture.capture_transformers"
        )
    probe = sizes(1, _PROBE_TOKENS)
    crossing = crossing_bytes(graph, probe)
    points = cut_points(graph, probe)
    least = min((crossing[point] for point in points), default=0)
    narrow = [point for point in points if crossing[point] <= _SAME * least]
    # Before an attention, the last narrow position is the border of its block; the head is behind the very last.
    ends = [max((p for p in narrow if p <= place), default=0) for place in attentions]
    ends.append(max(narrow, default=0))
    if any(early >= late for early, late in zip([0, *ends], [*ends, len(graph.nodes)], strict=True)):
        raise GraphError(
            f"{graph.name!r} cannot be cut between its {len(attentions)} attention operators with one tensor crossing; "
            "serving needs a decoder whose blocks follow one another"
        )
    return (0, *ends, len(graph.nodes))


def _kv_bytes(graph: OpDag, nodes: tuple[Node, ...], sizes: Sizes) -> float:
    """Return the bytes of keys and values of one token: the second and third argument of each attention."""
    found = 0
    for node in nodes:
        if node.op == ATTENTION:
            for argument in node.args[1:3]:
                assert isinstance(argument, Ref)
                found += type_bytes(graph.types[argument.name], sizes)
    return float(found)


def _array(values: list[int] | list[bool] | list[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)
