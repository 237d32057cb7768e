"""From one plan of a running job to the next: between two steps every weight goes straight to its new holder.

The running generation is not touched until the new one has everything: whatever fails before that leaves the old one
as it was, and training goes on there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusionai.errors import JobError
from fusionai.graph.model import WeightKey
from fusionai.training.driver import Driver, Machine


@dataclass(frozen=True, slots=True)
class Routes:
    """Who sends which weight to whom; peers throughout."""

    sources: dict[str, dict[WeightKey, str]]
    """By machine of the new generation: where each of its weights comes from."""
    targets: dict[str, dict[WeightKey, tuple[str, ...]]]
    """By machine of the running generation: where each weight that it is to send goes. Itself among them: in memory."""


@dataclass(frozen=True, slots=True)
class HandOverResult:
    """What a hand-over took."""

    bytes_moved: int
    """Tensor bytes between machines: weights and optimizer states."""
    seconds: float
    """Time in which no step ran."""


def routes(running: Sequence[Machine], new: Sequence[Machine]) -> Routes:
    """Return the way of every weight of the new machines. Pure.

    A machine that holds a weight already keeps it. Of several holders of a tied weight, whose copies are equal, the one
    that has the least to send so far sends it.

    Raises JobError when nobody holds a weight.
    """
    holders: dict[WeightKey, list[str]] = {}
    sizes: dict[str, int] = {each.peer: 0 for each in running}
    for machine in running:
        for key in machine.keys:
            holders.setdefault(key, []).append(machine.peer)
    sources: dict[str, dict[WeightKey, str]] = {}
    targets: dict[str, dict[WeightKey, tuple[str, ...]]] = {each.peer: {} for each in running}
    for machine in new:
        sources[machine.peer] = {}
        for key in machine.keys:
            known = holders.get(key)
            if not known:
                raise JobError(f"no machine of the running plan holds the weight {key!r}")
            source = machine.peer if machine.peer in known else min(known, key=lambda peer: (sizes[peer], peer))
            sizes[source] += source != machine.peer
            sources[machine.peer][key] = source
            targets[source][key] = (*targets[source].get(key, ()), machine.peer)
    return Routes(sources, targets)


async def hand_over(running: Driver, new: Driver, states: Sequence[str], *, optimizer_step: int) -> HandOverResult:
    """Give the new generation everything that the running one holds, between two steps.

    `states` are the optimizer's, `optimizer_step` the updates applied so far. When this returns, the new generation
    may go on where the running one stands, and the running one may be ended. On any error the running one is as it
    was; whether it still lives, `running.failed` tells.
    """
    start_s = time.perf_counter()
    ways = routes(running.machines, new.machines)
    trainable = {
        weight.key
        for machine in new.machines
        for subdag in machine.subdags
        for weight in subdag.weights
        if weight.trainable
    }
    await new.inherit(ways.sources)
    moved = asyncio.ensure_future(running.give(new.job, ways.targets))
    try:
        await new.guard(moved)  # what ends the new generation ends the waiting
    finally:
        moved.cancel()
        await asyncio.wait({moved})
    await new.settle(_counts(ways.sources, trainable, len(states)), optimizer_step=optimizer_step)
    return HandOverResult(moved.result(), time.perf_counter() - start_s)


def _counts(
    sources: Mapping[str, Mapping[WeightKey, str]], trainable: set[WeightKey], states: int
) -> dict[str, int]:
    """Return the tensors that each new machine must get."""
    return {peer: sum(1 + states * (key in trainable) for key in keys) for peer, keys in sources.items()}
