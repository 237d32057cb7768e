"""Weights that several stages of one machine use, such as tied embeddings: held once, updated once.

For each microbatch, a stage's gradient of such a weight waits until the other stages have computed theirs
(`execution.torch_plane.tied`). Waiting gradients take memory, which this module counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fusionai.graph.model import Weight, WeightKey
from fusionai.graph.sizes import type_bytes

MOST_WAITING_BYTES = 256 << 20
"""Most bytes of gradients that wait on one machine. A further gradient is added at once, and then the sum may differ
from a single process's in its last bits. A smaller bound makes that more likely; a larger one takes more memory."""


class WithWeights(Protocol):
    """A stage's index and weights: a `SubDag`, or an object with these parts of one."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Return the weights that the stage reads."""
        ...


@dataclass(frozen=True, slots=True)
class Repeated:
    """Bytes of a stage's weights that an earlier stage of the same machine holds too."""

    trainable: int = 0
    other: int = 0


def repeated(subdags: Iterable[WithWeights], machines: Iterable[Hashable]) -> list[Repeated]:
    """Return, by stage, the bytes of its weights that its machine already holds for earlier stages.

    Stages are counted in the order given; stages of other pipelines may follow.
    """
    found = []
    held: set[tuple[Hashable, WeightKey]] = set()
    for subdag, machine in zip(subdags, machines, strict=True):
        weights = _weights(subdag)
        again = [each for each in weights if (machine, each.key) in held]
        trainable = sum(type_bytes(each.type, {}) for each in again if each.trainable)
        other = sum(type_bytes(each.type, {}) for each in again if not each.trainable)
        found.append(Repeated(trainable, other))
        held |= {(machine, each.key) for each in weights}
    return found


def waiting_bytes(subdags: Sequence[WithWeights], in_flight: Sequence[int]) -> int:
    """Return the most bytes of gradients of shared weights that wait at one time on the machine of these stages.

    A gradient waits from the backward of the last stage that uses the weight until the backward of the first such
    stage. During that time a stage has at most `in_flight` microbatches under way.
    """
    most: dict[WeightKey, tuple[int, int]] = {}
    for subdag, held in zip(subdags, in_flight, strict=True):
        for weight in _weights(subdag):
            if weight.trainable:
                stages, so_far = most.get(weight.key, (0, 0))
                most[weight.key] = stages + 1, max(so_far, held * type_bytes(weight.type, {}))
    return waiting(sum(nbytes for stages, nbytes in most.values() if stages > 1))


def waiting(nbytes: int) -> int:
    """Return the bytes that are really kept of so many waiting bytes."""
    return min(MOST_WAITING_BYTES, nbytes)


def _weights(subdag: WithWeights) -> Iterable[Weight]:
    return {weight.key: weight for weight in subdag.weights}.values()
