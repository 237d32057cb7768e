"""Why no plan is possible, with the numbers, and what would help (`remedies`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusionai.errors import PlacementError
from fusionai.scheduling.estimator import heap_microbatches, training_memory_bytes
from fusionai.scheduling.explain import WITH_MARGIN, shortage_texts
from fusionai.scheduling.profile import Member
from fusionai.scheduling.remedies import Remedies
from fusionai.scheduling.segments import MEMORY_MARGIN, Segments

_MOST_NAMED = 5


def no_compnodes(remedies: Remedies) -> PlacementError:
    """The pool has nobody to serve."""
    return PlacementError(f"the pool has no compnodes: {remedies.first_machine}")


def too_few(wanted: int, free: int, remedies: Remedies) -> PlacementError:
    """The job asks for more compnodes than there are."""
    return PlacementError(
        f"the job asks for {wanted} compnodes, but only {free} are free and can be linked; {remedies.more_machines}, "
        "or lower placement.compnodes"
    )


def no_link_with_owner(members: Sequence[Member], owner: Member, remedies: Remedies) -> PlacementError:
    """Nobody can be linked with the owner's machine."""
    who = (
        f"the only free compnode, {members[0].name}, cannot"
        if len(members) == 1
        else f"none of the {len(members)} free compnodes ({_named(members)}) can"
    )
    return PlacementError(
        f"{who} be linked with the owner's machine, {owner.name}: one side of each link must listen where the other "
        f"can dial it; {remedies.dialable}"
    )


def owner_too_small(owner: Member, need_bytes: float) -> PlacementError:
    """The pinned stages do not fit the owner's machine."""
    need, offered, missing = shortage_texts(need_bytes, owner.device.memory_bytes)
    return PlacementError(
        f"{WITH_MARGIN}, the owner's own stages (what touches its data) need {need}, but its machine, {owner.name}, "
        f"offers {offered}, {missing} too little; lower training.batch_size, "
        'raise the memory offered, or use placement.privacy = "open" if the compnodes may see the data'
    )


def nothing_fits(
    segments: Segments,
    members: Sequence[Member],
    *,
    fewest: int,
    most: int,
    optimizer_states: int,
    remedies: Remedies,
) -> PlacementError:
    """No split meets the compnodes' memory, or their links.

    Args:
        segments: of the graph.
        members: compnodes that can be linked with the owner's machine.
        fewest: compnodes that a plan must have.
        most: compnodes that one pipeline may have.
        optimizer_states: tensors that the optimizer keeps for each weight.
        remedies: what to advise.
    """
    last = len(segments.costs)
    if last < fewest:
        return PlacementError(
            f"the job asks for {fewest} compnodes, but the model can be cut into {last} parts at most; lower "
            "placement.compnodes"
        )
    best = max(members, key=lambda each: each.device.memory_bytes)
    parts = [training_memory_bytes(cost, best.device, 1, optimizer_states) for cost in segments.costs]
    largest, offer = max(parts) * MEMORY_MARGIN, best.device.memory_bytes
    held = 1 + min(heap_microbatches(each.device) for each in members)
    flight = held * float(segments.flight_bytes_PP[0, last])
    need = (float(segments.fixed_bytes_PP[0, last]) + flight) * MEMORY_MARGIN
    used = sorted((each.device.memory_bytes for each in members), reverse=True)[: min(most, last)]
    # How many like the best would do: if it cannot hold the largest part, like one that just can.
    enough = _enough(segments, max(offer, largest) / MEMORY_MARGIN, 1 + heap_microbatches(best.device))
    text, total = _in_total(need, used)
    if largest > offer:
        return _part_too_large(largest, best, total, enough, remedies)
    like = f" ({enough} like {best.name} could hold it)" if enough > len(used) else ""
    help_text = f"add compnodes{like}, {remedies.more_memory}, or lower training.batch_size"
    text = f"{WITH_MARGIN}, {text}"
    if total:
        return PlacementError(f"{WITH_MARGIN}, {total}; {help_text}")
    hidden = [each for each in members if not each.dialable]
    pairs = len(hidden) * (len(hidden) - 1) // 2
    if pairs:
        return PlacementError(
            f"{text}, but {pairs} pair{'s' if pairs > 1 else ''} of compnodes cannot be linked, since neither side can "
            f"be dialled ({_named(hidden)}); {remedies.dialable}"
        )
    return PlacementError(f"{text}, but no cut gives each a part that fits, working space included; {help_text}")


def _in_total(need_bytes: float, used_bytes: Sequence[int]) -> tuple[str, str]:
    """Return what the compnodes' share needs and what is offered, in words; and what is missing, "" if nothing is."""
    need, offered, missing = shortage_texts(need_bytes, sum(used_bytes))
    who = f"{len(used_bytes)} compnodes that may be used offer"
    if len(used_bytes) == 1:
        who = "one compnode that may be used offers"
    text = f"training the compnodes' share of the model needs at least {need}, and the {who} {offered}"
    return text, f"{text}: {missing} are missing" if need_bytes > sum(used_bytes) else ""


def _part_too_large(largest_bytes: float, best: Member, total: str, enough: int, remedies: Remedies) -> PlacementError:
    """Nobody holds the model's largest part; `total`: what all lack together, "" if nothing."""
    need, offered, _ = shortage_texts(largest_bytes, best.device.memory_bytes)
    beside = f", and {total}" if total else ""
    what = f"compnodes, one with at least {need} ({enough} with {need} each could hold the model)"
    if not total:
        what = f"a compnode that offers at least {need}"
    return PlacementError(
        f"{WITH_MARGIN}, the smallest stage that holds the model's largest part needs {need}, but the best compnode, "
        f"{best.name}, offers {offered}{beside}; add {what}, {remedies.more_memory}, or lower training.batch_size"
    )


def _enough(segments: Segments, budget_bytes: float, held: int) -> int:
    """Return how many machines with such a budget hold the model, `held` microbatches each; each part fits one."""
    need_PP = segments.fixed_bytes_PP + held * segments.flight_bytes_PP
    count = start = 0
    while start < len(segments.costs):
        # Longer ranges need more: whoever takes all that fits leaves least to the others.
        fitting = np.flatnonzero(need_PP[start, start + 1 :] <= budget_bytes)
        start += 1 + (int(fitting[-1]) if len(fitting) else 0)
        count += 1
    return count


def _named(members: Sequence[Member]) -> str:
    """Return the names of the first few machines."""
    more = ", ..." if len(members) > _MOST_NAMED else ""
    return ", ".join(each.name for each in members[:_MOST_NAMED]) + more
