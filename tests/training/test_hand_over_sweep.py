"""A machine dies, or a link is cut, at every point of a hand-over to a new plan.

The running plan has its stages on a, b and c; the new one on c and d. Machine c keeps weights and gets more, a and b
give theirs away, d comes. A clean run lists its points: each message of the hand-over, sent and arrived. What holds:

1. A fault that the new plan alone meets (d dies, or a link that only it needs breaks) gives the new plan up: the
   hand-over raises JobError, and the job goes on by the running plan and computes what it should.
2. A fault that the running plan meets ends the job with a JobError that names a machine that is lost, or lost a link.
3. Machines of both plans that live drop the share of the plan that has ended, and keep the other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from scripted_pool import ScriptedPool, Seen
from toy_pipelines import OWNER, STATES, Pipeline, Reference, batch, three_machines

from fusionai.errors import JobError
from fusionai.network.clock import run_scripted
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch
from fusionai.scheduling.recovery import PATIENCE
from fusionai.training.handing_over import hand_over

NAMES = (OWNER, "a", "b", "c", "d")
OLD = three_machines()
NEW = Pipeline(OLD.graph, (1,), ("c", "d"))
NEXT = Epoch(1)


@dataclass
class Outcome:
    """How a hand-over and the step after it went."""

    error: str = ""
    """Of the hand-over."""
    ending: str = ""
    """Of the running plan."""
    losses: list[float] = field(default_factory=list)
    weights: dict[tuple[str, str | None], bytes] = field(default_factory=dict)
    held: dict[str, set[Epoch]] = field(default_factory=dict)
    """Epochs whose shares the living machines hold in the end, the owner apart."""


def run_with(fault: Callable[[ScriptedPool, Seen], None] | None, seen: Seen | None) -> tuple[Outcome, list[Seen]]:
    """Train a step, hand over with a fault at a point, and train another step."""

    async def main() -> tuple[Outcome, list[Seen]]:
        outcome = Outcome()
        async with ScriptedPool(*NAMES) as pool:
            running = await pool.launch(OLD)
            outcome.losses += [each.loss for each in await pool.train(running, 1)]
            following = await pool.launch(NEW, NEXT, prepare=False, handing=OLD)
            for name in (*NEW.machines, *OLD.machines):
                for other in NAMES[1:]:
                    if name < other and pool.machines[name].endpoint.link(pool.machines[other].peer) is None:
                        there = pool.machines[other]
                        await pool.machines[name].endpoint.connect(there.peer, [there.address], timeout_s=5)
            pool.faults.seen.clear()
            if fault is not None and seen is not None:
                pool.faults.at(seen.point, lambda other: fault(pool, seen))
            driver, ended = following, running
            try:
                await hand_over(running, following, STATES, optimizer_step=1)
            except JobError as error:
                outcome.error = str(error)
                driver, ended = running, following
            points = list(pool.faults.seen)
            await ended.close("it goes on by the other plan")
            await asyncio.sleep(2 * PATIENCE.neighbour_link_s)
            try:
                outcome.losses += [each.loss for each in await pool.train(driver, 1, first=1)]
                outcome.weights = await pool.tensors(driver)
            except JobError as error:
                outcome.ending = str(error)
                await driver.close(outcome.ending)
                await asyncio.sleep(1)
            for name in NAMES[1:]:
                if pool.network.alive(name):
                    outcome.held[name] = {plan.epoch for plan in pool.machines[name].wire._receivers}
            assert seen is None or pool.faults.fired, f"the run did not come by {seen}"
        return outcome, points

    return run_scripted(main())


def kill(pool: ScriptedPool, seen: Seen) -> None:
    """The machine that comes by the point dies there."""
    pool.network.kill(seen.point.machine)


def cut(pool: ScriptedPool, seen: Seen) -> None:
    """The link that the message is for breaks, and both ends live."""
    pool.network.cut(seen.point.machine, seen.other)


def points() -> list[Seen]:
    """The points of a clean hand-over."""
    outcome, seen = run_with(None, None)
    assert (outcome.error, outcome.ending) == ("", "")
    assert outcome.held == {"a": set(), "b": set(), "c": {NEXT}, "d": {NEXT}}
    assert outcome.losses == expected_losses()
    return seen


def expected_losses() -> list[float]:
    return reference()[0]


def reference() -> tuple[list[float], dict[tuple[str, str | None], bytes]]:
    """What two steps give when nothing happens."""
    made = Reference(OLD)
    return [made.train_step(batch(step, 2), [0.5, 0.5], 0.125) for step in range(2)], made.tensors()


def check_given_up(outcome: Outcome, seen: Seen, *names: str) -> None:
    """The new plan is given up, and the job goes on as if nothing had been."""
    assert outcome.error.startswith(tuple(f"compnode {name} (stage " for name in names)), (seen, outcome)
    assert not outcome.ending, (seen, outcome)
    assert (outcome.losses, outcome.weights) == reference(), seen
    assert all(outcome.held[name] == {FIRST_EPOCH} for name in "abc"), (seen, outcome)
    assert not outcome.held.get("d"), (seen, outcome)


def test_the_sweep_comes_by_everything() -> None:
    kinds = Counter(each.point.event for each in points())
    # Two machines inherit and finish; b and c give a weight and its state each.
    requests = ("inherit_weights", "hand_over_weights", "finish_loading")
    assert kinds == {
        **{f"{verb} {what}{kind}": 2 for verb in ("sends", "gets") for what in ("", "answer to ") for kind in requests},
        **{f"{verb} weight_tensor": 4 for verb in ("sends", "gets")},
    }


def test_a_machine_dies_at_every_point_of_a_hand_over() -> None:
    for seen in points():
        lost = seen.point.machine
        if lost == OWNER:
            continue
        outcome, _ = run_with(kill, seen)
        if lost == "d":
            check_given_up(outcome, seen, "d")
        else:
            assert outcome.error.startswith(f"compnode {lost} (stage "), (seen, outcome)
            assert outcome.ending.startswith(f"compnode {lost} (stage "), (seen, outcome)
            assert not any(outcome.held.values()), (seen, outcome)


def test_a_link_is_cut_at_every_message_of_a_hand_over() -> None:
    for seen in points():
        if not seen.point.event.startswith("sends"):
            continue
        outcome, _ = run_with(cut, seen)
        ends = {seen.point.machine, seen.other} - {OWNER}
        if "d" in ends:
            check_given_up(outcome, seen, *ends)
        else:
            assert outcome.ending.startswith(tuple(f"compnode {end} (stage " for end in ends)), (seen, outcome)
            assert not any(outcome.held.values()), (seen, outcome)
