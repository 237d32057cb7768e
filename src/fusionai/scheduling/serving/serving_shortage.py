"""Why a model cannot be served by a pool, with the numbers and what would help."""

from __future__ import annotations

import numpy as np

from fusionai.errors import PlacementError
from fusionai.scheduling.explain import WITH_MARGIN, shortage_texts
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.serving.serving_evaluation import Evaluator

_MOST_NAMED = 5


def nothing_fits(evaluator: Evaluator) -> PlacementError:
    """Return the error that says what is missing, and by how much."""
    task = evaluator.task
    front, back = task.front, task.back
    linked = task.linked_NN[task.gateway, : task.gateway]
    if not linked.any():
        owner = "" if task.owner is None else f", {task.owner.name}"
        many = len(task.members) > 1
        who = f"none of the {len(task.members)} compnodes can" if many else "the only compnode cannot"
        return PlacementError(
            f"{who} be linked with the gateway's machine{owner}: one side of each link must listen where the other can "
            "dial it; start `fusionai join` with --listen HOST:PORT, and --advertise behind a router"
        )
    cache_S = task.model.kv_bytes_S * task.load.reserved_tokens
    working = float(evaluator.times.fixed_bytes[0, 0, 0])
    single = MEMORY_MARGIN * (task.model.weight_bytes_S + cache_S + working)
    largest = front + int(np.argmax(single[front:back]))
    offers = np.asarray([member.device.memory_bytes for member in task.members])
    best = int(offers.argmax())
    if single[largest] > offers[best]:
        needed, offered, missing = shortage_texts(single[largest], int(offers[best]))
        return PlacementError(
            f"{WITH_MARGIN}, the largest part of {task.model.name} ({_part(evaluator, largest)}) needs {needed}, with "
            f"the cache of one request of {task.load.reserved_tokens:.0f} tokens, but the best compnode, "
            f"{task.members[best].name}, offers {offered}, {missing} too little; add a compnode that offers {needed}, "
            "or raise its --memory"
        )
    need = MEMORY_MARGIN * float((task.model.weight_bytes_S + cache_S)[front:back].sum())
    usable = np.maximum(offers - MEMORY_MARGIN * working, 0.0)
    needed, offered, missing = shortage_texts(need, int(usable.sum()))
    text = (
        f"{WITH_MARGIN}, serving {task.model.name} needs {needed} for weights and the caches of one request, and the "
        f"{f'{len(offers)} compnodes offer' if len(offers) > 1 else 'only compnode offers'} {offered} beyond their "
        "working space"
    )
    if need > usable.sum():
        return PlacementError(
            f"{text}: {missing} are missing; add compnodes, raise their --memory, or serve a smaller model"
        )
    hidden = [member.name for member in task.members if not member.dialable]
    if len(hidden) > 1:
        shown = ", ".join(hidden[:_MOST_NAMED]) + (", ..." if len(hidden) > _MOST_NAMED else "")
        return PlacementError(
            f"{text}, but machines that hold neighbouring parts must be linked, and of {shown} no two can be, since "
            "neither side can be dialled; start `fusionai join` with --listen and --advertise on some of them"
        )
    return PlacementError(
        f"{text}, but no cut between blocks gives each a part that fits; add a compnode, or raise some --memory"
    )


def _part(evaluator: Evaluator, segment: int) -> str:
    if segment == 0:
        return "the embedding"
    blocks = evaluator.task.model.blocks
    return f"block {segment - 1}" if segment <= blocks else "the head"
