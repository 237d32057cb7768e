"""OP-DAGs as canonical JSON: one graph, one text, one hash. Loading checks everything and executes nothing.

Only the canonical text of a graph is accepted, so a text with fields that this version does not know is refused.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from fusionai.errors import GraphError
from fusionai.graph.model import OpDag, SubDag
from fusionai.graph.verify import DEFAULT_LIMITS, GraphLimits, verify, verify_subdag

_Graph = TypeVar("_Graph", OpDag, SubDag)
_encoder = msgspec.json.Encoder(order="sorted")


def encode(graph: OpDag) -> bytes:
    """Return the canonical JSON of an OP-DAG: fields and names sorted, no spaces."""
    return _encoder.encode(graph)


def encode_subdag(subdag: SubDag) -> bytes:
    """Return the canonical JSON of a sub-DAG."""
    return _encoder.encode(subdag)


def content_hash(graph: OpDag) -> str:
    """Return the SHA-256 of an OP-DAG's canonical JSON, in hexadecimal."""
    return hashlib.sha256(encode(graph)).hexdigest()


def decode(data: bytes | bytearray | memoryview, limits: GraphLimits = DEFAULT_LIMITS) -> OpDag:
    """Return the OP-DAG that a JSON text holds, verified. Raises GraphError for every other text."""
    graph = _parsed(data, OpDag, limits)
    verify(graph, limits)
    return graph


def decode_subdag(data: bytes | bytearray | memoryview, limits: GraphLimits = DEFAULT_LIMITS) -> SubDag:
    """Return the sub-DAG that a JSON text holds, verified. Raises GraphError for every other text."""
    subdag = _parsed(data, SubDag, limits)
    verify_subdag(subdag, limits)
    return subdag


def _parsed(data: bytes | bytearray | memoryview, kind: type[_Graph], limits: GraphLimits) -> _Graph:
    if len(data) > limits.encoded_bytes:
        raise GraphError(f"an OP-DAG of {len(data):,} bytes; at most {limits.encoded_bytes:,} are allowed")
    try:
        found = msgspec.json.decode(data, type=kind)
        canonical = _encoder.encode(found)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise GraphError(f"this is no OP-DAG: {str(error)[:400]}") from error
    if canonical != data:
        # Two texts with unknown or repeated fields, or another spelling of a number, must not share one hash.
        raise GraphError("this OP-DAG is not in canonical form; write it with fusionai.graph.encoding.encode")
    return found
