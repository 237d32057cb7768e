"""What a share of a job may take of the machine that holds it. Reckoned here again, since the figures of a
share are those of strangers: the owner, who wrote the graph and chooses the sizes, and the broker."""

from __future__ import annotations

from fusionai.errors import JobError
from fusionai.graph.cost import stage_cost
from fusionai.graph.evaluation import face
from fusionai.graph.model import Sizes
from fusionai.graph.shared_weights import repeated
from fusionai.graph.sizes import type_bytes
from fusionai.training.share import Share

MOST_SYMBOLS = 64
"""Symbols that a round may give numbers for; a broker takes no more."""


def check_weights(share: Share, limit_bytes: int) -> None:
    """Raise JobError when the weights, their gradients and optimizer states alone exceed `limit_bytes`."""
    copies = 2 + len(share.options.optimizer.states)
    weights = share.weights().values()
    need = sum(type_bytes(each.type, {}) * (copies if each.trainable else 1) for each in weights)
    _check(need, limit_bytes, "the weights of this share with what training keeps for them take")


def check_round(share: Share, sizes: Sizes, *, train: bool, limit_bytes: int) -> None:
    """Raise JobError when a round at `sizes` needs more than `limit_bytes`, GraphError when it cannot be run at all.

    Takes a millisecond for each few operators: call it in a thread.
    """
    if len(sizes) > MOST_SYMBOLS:
        raise JobError(f"a round gives numbers for {len(sizes)} symbols; at most {MOST_SYMBOLS} are allowed")
    states = len(share.options.optimizer.states)
    need = working = 0
    here = [0] * len(share.subdags)
    for subdag, again in zip(share.subdags, repeated(share.subdags, here), strict=True):
        cost = stage_cost(face(subdag, train), sizes)
        in_flight = share.in_flight.get(subdag.index, 1) if train else 0
        need += cost.training_bytes(in_flight, states) - cost.transient_bytes
        need -= (2 + states) * again.trainable + again.other
        working = max(working, cost.transient_bytes)
    _check(need + working, limit_bytes, f"a round at sizes {dict(list(sizes.items())[:8])} takes")


def _check(need_bytes: int, limit_bytes: int, what: str) -> None:
    if need_bytes > limit_bytes:
        raise JobError(
            f"{what} {need_bytes:,} bytes, but this machine offers {limit_bytes:,}; use smaller batches or more "
            "compnodes"
        )
