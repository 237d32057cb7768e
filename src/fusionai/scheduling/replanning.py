"""Re-planning of a running job on join, quit and drift: a new plan, if it pays for what it moves.

The objective is the time to the job's end: steps left times the step, plus the time to bring weights and optimizer
states from where they are to where the new plan wants them. Machines that stay keep what they hold unless moving pays.
Why, and what was measured: docs/decisions/0012-sticky-replanning.md.
"""

from __future__ import annotations

import msgspec

from fusionai.errors import PlacementError
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.sticky_search import Option, Search
from fusionai.scheduling.transfers import Move
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


def replanned(problem: TrainingProblem, running: Plan, steps_left: int) -> Replanned | None:
    """Return the plan to go on with, or None to keep the running one. Blocks for seconds: call it in a thread.

    Args:
        problem: the job on every machine that may be used now, devices corrected (`corrections.corrected`). The graph
            is as arranged for `running`. Machines of `problem.limits.leaving` are there only to hand on what they hold.
        running: the plan that runs, of one pipeline. One of its machines that is not in `problem` has left.
        steps_left: steps that will run after the switch.

    Raises:
        PlacementError: a machine has left or is leaving, and no plan meets the constraints without it.
    """
    if steps_left <= 0:
        return None
    search = Search(problem, running, steps_left)
    kept = search.kept()
    if kept is None:
        return _result(search.best(), 0.0, _without(problem, running))
    try:
        best = search.best()
    except PlacementError:
        return None  # it runs already, whatever the estimates say of another one
    gain_s = kept.total_s - best.total_s
    if gain_s < LEAST_GAIN * kept.total_s:
        return None
    return _result(
        best,
        gain_s,
        f"a step takes {seconds_text(best.evaluated.step_s)} instead of {seconds_text(kept.evaluated.step_s)}, which "
        f"over {steps_left} steps gains {seconds_text(gain_s)}",
    )


def _without(problem: TrainingProblem, running: Plan) -> str:
    """Say which machines of a plan are not there any more, or want to go."""
    names = {each.peer: each.name for each in problem.machines}
    used = dict.fromkeys(stage.peer for stage in running.stages)
    gone = ", ".join(peer for peer in used if peer not in names)
    going = ", ".join(names[peer] for peer in used if peer in names and peer in problem.limits.leaving)
    return " and ".join([*([f"{gone} left"] if gone else []), *([f"{going} leaves"] if going else [])])


def _result(option: Option, gain_s: float, reason: str) -> Replanned:
    nbytes = sum(move.nbytes for move in option.moves)
    moved = f"{bytes_text(nbytes)} move in about {seconds_text(option.move_s)}" if nbytes else "nothing moves"
    why = f"{reason}; {moved}"
    return Replanned(option.evaluated.plan(notes=(why,)), option.moves, option.move_s, gain_s, why)
