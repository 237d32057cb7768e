"""From one plan of a running job to the next: between two steps every weight goes straight to its new holder.

The running plan's machines are not touched until those of the new one have everything: whatever fails before that
leaves them as they were, and training goes on there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusionai.graph.model import WeightKey
from fusionai.network.clock import now_s
from fusionai.training.driver import Driver
from fusionai.training.weight_routes import routes


@dataclass(frozen=True, slots=True)
class HandOverResult:
    """What a hand-over took."""

    bytes_moved: int
    """Tensor bytes between machines: weights and optimizer states."""
    seconds: float
    """Time in which no step ran."""


async def hand_over(running: Driver, new: Driver, states: Sequence[str], *, optimizer_step: int) -> HandOverResult:
    """Give the machines of the new plan everything that those of the running one hold, between two steps.

    `states` are the optimizer's, `optimizer_step` the updates applied so far. When this returns, the job may go on by
    the new plan, and the running one may be ended. On any error the running plan is as it was; whether it still lives,
    `running.watch.failed` tells.
    """
    start_s = now_s()
    ways = routes({each.peer: each.keys for each in running.machines}, {each.peer: each.keys for each in new.machines})
    trainable = {
        weight.key
        for machine in new.machines
        for subdag in machine.subdags
        for weight in subdag.weights
        if weight.trainable
    }
    await new.weights.inherit(ways.sources)
    moved = asyncio.ensure_future(running.weights.give(new.epoch, ways.targets))
    try:
        await new.watch.guard(moved)  # what ends the new plan ends the waiting
    finally:
        moved.cancel()
        await asyncio.wait({moved})
    await new.weights.settle(_counts(ways.sources, trainable, len(states)), optimizer_step=optimizer_step)
    return HandOverResult(moved.result(), now_s() - start_s)


def _counts(sources: Mapping[str, Mapping[WeightKey, str]], trainable: set[WeightKey], states: int) -> dict[str, int]:
    """Return the tensors that each new machine must get."""
    return {peer: sum(1 + states * (key in trainable) for key in keys) for peer, keys in sources.items()}
