"""Re-planning of a running job on join, quit and drift: a new plan, if it pays for what it moves.

The objective is the time to the job's end: steps left times the step, plus the time to bring weights and optimizer
states from where they are to where the new plan wants them. Machines that stay keep what they hold unless moving pays.
Why, and what was measured: docs/decisions/0012-sticky-replanning.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from fusionai.errors import PlacementError
from fusionai.graph.model import OpDag
from fusionai.scheduling.evaluation import Task
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import Member, Pool
from fusionai.scheduling.sticky.moves import Haulage, Move
from fusionai.scheduling.sticky.search import Option, Search
from fusionai.units.byte_counts import bytes_text
from fusionai.units.durations import seconds_text

__all__ = ["LEAST_GAIN", "Move", "Replanned", "replanned"]

LEAST_GAIN = 0.05
"""A plan that would run on is left only for at least this share of its remaining time.

Predicted steps are meant to be within that in the median, so a smaller gain may be none; and a pool whose speeds waver
would have its states moved to and fro.
"""


class Replanned(msgspec.Struct, frozen=True):
    """A plan that should follow the running one."""

    plan: Plan
    moves: tuple[Move, ...]
    """All that the plan's machines need and do not hold."""
    move_s: float
    gain_s: float
    """Gained over the remaining steps, `move_s` taken off; 0 where the running plan cannot go on."""
    reason: str


def replanned(
    graph: OpDag,
    *,
    running: Plan,
    optimizer_states: int,
    precision: Literal["fp32", "bf16"],
    pool: Pool,
    owner: Member,
    front: int,
    back: int,
    steps_left: int,
    split_backward: bool = True,
    compnodes: int = 0,
    leaving: Collection[str] = (),
) -> Replanned | None:
    """Return the plan to go on with, or None to keep the running one. Blocks for seconds: call it in a thread.

    Args:
        graph: as arranged for `running`; nodes [0, front) and [back, N) are pinned to the owner's machine.
        running: the plan that runs. One of its machines that is not in `pool` has left.
        optimizer_states: tensors that the optimizer keeps for each trained weight; they move with it.
        precision: of the computation.
        pool: every machine that may be used now, devices corrected (`corrections.corrected`), and the links.
        owner: the owner's machine.
        front: where the owner's first stage ends.
        back: where the owner's last stage starts.
        steps_left: steps that will run after the switch.
        split_backward: see `evaluation.Task`.
        compnodes: how many machines besides the owner's the job asks for, 0 for as many as serve best.
        leaving: machines of `pool` that get no stage: they are there only to hand on what they hold.

    Raises:
        PlacementError: a machine has left or is leaving, and no plan meets the constraints without it.
    """
    if steps_left <= 0:
        return None
    task = Task(
        graph=graph,
        graph_hash=running.graph_hash,
        sizes=running.sizes,
        microbatches=running.microbatches,
        optimizer_states=optimizer_states,
        precision=precision,
        pool=msgspec.structs.replace(pool, members=tuple(each for each in pool.members if each.peer not in leaving)),
        owner=owner,
        privacy=running.privacy,
        front=front,
        back=back,
        split_backward=split_backward,
    )
    search = Search(task, running, steps_left, compnodes, Haulage(pool, owner))
    kept = search.kept()
    if kept is None:
        return _result(search.best(), 0.0, _without(running, pool, owner, leaving))
    try:
        best = search.best()
    except PlacementError:
        return None  # it runs already, whatever the estimates say of another one
    gain_s = kept.total_s - best.total_s
    if gain_s < LEAST_GAIN * kept.total_s:
        return None
    step_s, new_s = kept.plan.predicted_step_s, best.plan.predicted_step_s
    return _result(
        best,
        gain_s,
        f"a step takes {seconds_text(new_s)} instead of {seconds_text(step_s)}, which over {steps_left} steps gains "
        f"{seconds_text(gain_s)}",
    )


def _without(running: Plan, pool: Pool, owner: Member, leaving: Collection[str]) -> str:
    """Say which machines of a plan are not there any more, or want to go."""
    names = {owner.peer: owner.name, **{each.peer: each.name for each in pool.members}}
    used = dict.fromkeys(stage.peer for stage in running.stages)
    gone = ", ".join(peer for peer in used if peer not in names)
    going = ", ".join(names[peer] for peer in used if peer in names and peer in leaving)
    return " and ".join([*([f"{gone} left"] if gone else []), *([f"{going} leaves"] if going else [])])


def _result(option: Option, gain_s: float, reason: str) -> Replanned:
    nbytes = sum(move.nbytes for move in option.moves)
    moved = f"{bytes_text(nbytes)} move in about {seconds_text(option.move_s)}" if nbytes else "nothing moves"
    why = f"{reason}; {moved}"
    plan = msgspec.structs.replace(option.plan, explanation=(*option.plan.explanation, why))
    return Replanned(plan, option.moves, option.move_s, gain_s, why)
