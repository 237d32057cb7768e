"""Why no plan is possible, with the numbers and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from fusionai.errors import PlacementError
from fusionai.scheduling.estimator import heap_microbatches, training_memory_bytes
from fusionai.scheduling.evaluation import Evaluated, Task
from fusionai.scheduling.explain import bytes_text
from fusionai.scheduling.profile import Member
from fusionai.scheduling.segments import MEMORY_MARGIN, Segments, reachable

_MOST_NAMED = 5


def no_link_with_owner(task: Task) -> PlacementError:
    """Nobody can be linked with the owner's machine."""
    return PlacementError(
        f"none of the {len(task.pool.members)} free compnodes ({_named(task.pool.members)}) can be linked with the "
        f"owner's machine, {task.owner.name}: one side of each link must listen where the other can dial it; start "
        "`fusionai join` with --listen HOST:PORT, and --advertise behind a router"
    )


def owner_too_small(task: Task, smallest: Evaluated) -> PlacementError:
    """The pinned stages do not fit the owner's machine."""
    offered, need = task.owner.device.memory_bytes, smallest.needs_bytes[task.owner.peer]
    return PlacementError(
        f"the owner's own stages (what touches its data) need {bytes_text(need)}, but its machine, {task.owner.name}, "
        f"offers {bytes_text(offered)}, {bytes_text(need - offered)} too little; lower training.batch_size, raise the "
        'memory offered, or use placement.privacy = "open" if the compnodes may see the data'
    )


def _named(members: Sequence[Member]) -> str:
    """Return the names of the first few machines."""
    more = ", ..." if len(members) > _MOST_NAMED else ""
    return ", ".join(each.name for each in members[:_MOST_NAMED]) + more


def nothing_fits(task: Task, segments: Segments, members: Sequence[Member], counts: Sequence[int]) -> PlacementError:
    """No split meets the compnodes' memory, or their links."""
    if len(segments.costs) < min(counts):
        return PlacementError(
            f"the job asks for {min(counts)} compnodes, but the model can be cut into {len(segments.costs)} parts at "
            "most; lower placement.compnodes"
        )
    states = task.optimizer_states
    best = max(members, key=lambda each: each.device.memory_bytes)
    smallest = max(training_memory_bytes(cost, best.device, 1, states) for cost in segments.costs) * MEMORY_MARGIN
    offer = best.device.memory_bytes
    if smallest > offer:
        return PlacementError(
            f"the smallest stage that holds the model's largest part needs {bytes_text(smallest)}, but the best "
            f"compnode, {best.name}, offers {bytes_text(offer)}; add a compnode that offers "
            f"{bytes_text(smallest - offer)} more, raise its --memory, or lower training.batch_size"
        )
    last = len(segments.costs)
    held = 1 + min(heap_microbatches(each.device) for each in members)
    flight = held * float(segments.flight_bytes_PP[0, last])
    need = (float(segments.fixed_bytes_PP[0, last]) + flight) * MEMORY_MARGIN
    used = sorted((each.device.memory_bytes for each in members), reverse=True)[: max(counts)]
    text = (
        f"training the compnodes' share of the model needs at least {bytes_text(need)}, and the {len(used)} "
        f"compnode{'s' if len(used) > 1 else ''} that may be used offer{'' if len(used) > 1 else 's'} "
        f"{bytes_text(sum(used))}"
    )
    help_text = "add compnodes, raise their --memory, or lower training.batch_size"
    if need > sum(used):
        return PlacementError(f"{text}: {bytes_text(need - sum(used))} are missing; {help_text}")
    unlinked = sum(not reachable(one, other) for index, one in enumerate(members) for other in members[index + 1 :])
    if unlinked:
        hidden = [each for each in members if not each.dialable]
        return PlacementError(
            f"{text}, but {unlinked} pair{'s' if unlinked > 1 else ''} of compnodes cannot be linked, since neither "
            f"side can be dialled ({_named(hidden)}); start `fusionai join` with --listen and --advertise on some of "
            "them"
        )
    return PlacementError(f"{text}, but no cut gives each a part that fits, working space included; {help_text}")
