"""A machine dies, vanishes, or loses a link, at every point that two steps of a small job come by.

Machines a, b and c hold the first, the middle and the last stage; a and c share a weight; the owner drives. A clean run
lists its points: each message when it is sent and when it arrives, and each transition of a machine's ledger. Then the
job is run anew for each point and kind of fault. What holds today:

1. The step under way ends with a JobError that names the machine that is lost; where a link between two machines is
   cut, one of the two. After the last commit no step is under way, and nothing is noticed.
2. It ends within the patience that is stated below, by the scripted clock.
3. Every machine that lives ends its share for one reason: no receiver, no task and no program is left.
4. A step that the driver reports as failed was applied by no machine. A step that it reports as done was applied by
   every machine that lives and kept its link to the owner. Commits are not acknowledged: a machine whose link to the
   owner breaks may have lost the last commit, or drops the update that it was told to make and has not begun.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from scripted_pool import Point, ScriptedPool, Seen
from toy_pipelines import OWNER, Reference, batch, three_machines

from fusionai.errors import JobError
from fusionai.network.clock import now_s, run_scripted
from fusionai.scheduling.recovery import PATIENCE
from fusionai.training.driver import Driver

NAMES = (OWNER, "a", "b", "c")
STEPS = 2
RESET_S = 0.1
"""From a reset connection to the error: a few ways over links of 1 ms, and calls of 5 ms."""
SILENCE_S = 10.0 + 0.5 + 2.5 + 1.0
"""From vanishing to the error: the patience with silence, its margin, the interval of the pings that look, and the
farewell that nobody takes."""
ENDING_S = 0.1
"""From the error until nothing is left on the machines that live."""


@dataclass
class Outcome:
    """How a run ended."""

    error: str = ""
    completed: int = 0
    """Steps that the driver reported as done."""
    took_s: float = 0.0
    """Scripted seconds from the fault to the error; 0 when there was none."""
    ended_s: float = 0.0
    """Scripted seconds from the fault until nothing of the job was left on a living machine."""
    updates: dict[str, int] = field(default_factory=dict)
    """By living machine."""
    reasons: dict[str, list[str]] = field(default_factory=dict)


Fault = Callable[[ScriptedPool, Seen], None]


def run_with(fault: Fault | None, seen: Seen | None) -> tuple[Outcome, list[Seen]]:
    """Train two steps, with a fault at a point."""

    async def train(pool: ScriptedPool, driver: Driver, outcome: Outcome) -> None:
        for step in range(STEPS):
            await pool.train(driver, 1, first=step)
            outcome.completed += 1

    async def main() -> tuple[Outcome, list[Seen]]:
        outcome = Outcome()
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(three_machines())
            struck_s: list[float] = []
            pool.faults.seen.clear()
            if fault is not None and seen is not None:

                def strike(other: str) -> None:
                    struck_s.append(now_s())
                    fault(pool, seen)

                pool.faults.at(seen.point, strike)
            training = asyncio.ensure_future(train(pool, driver, outcome))
            if seen is not None and seen.point.machine == OWNER and fault is not cut:
                await pool.until(lambda: struck_s and not pool.holding(), within_s=60)
                training.cancel()
                await asyncio.wait({training})
            else:
                await asyncio.wait({training})
                if (error := training.exception()) is not None:
                    assert isinstance(error, JobError), repr(error)
                    outcome.error = str(error)
                    outcome.took_s = now_s() - struck_s[0]
                await driver.close(outcome.error or "done")
                await pool.until(lambda: not pool.holding(), within_s=60)
            outcome.ended_s = now_s() - struck_s[0] if struck_s else 0.0
            for name in "abc":
                machine = pool.machines[name]
                if machine.alive:
                    outcome.updates[name] = machine.program.updates
                    outcome.reasons[name] = machine.ended
            assert fault is None or struck_s, f"the run did not come by {seen}"
            return outcome, list(pool.faults.seen)

    return run_scripted(main())


def kill(pool: ScriptedPool, seen: Seen) -> None:
    """The machine that comes by the point dies there."""
    pool.network.kill(seen.point.machine)


def vanish(pool: ScriptedPool, seen: Seen) -> None:
    """Its cable is pulled."""
    pool.network.vanish(seen.point.machine)


def cut(pool: ScriptedPool, seen: Seen) -> None:
    """The link that the message is for breaks, and both ends live."""
    pool.network.cut(seen.point.machine, seen.other)


def points() -> list[Seen]:
    """The points of the rounds of a clean run."""
    outcome, seen = run_with(None, None)
    assert outcome.completed == STEPS
    assert outcome.updates == {"a": STEPS, "b": STEPS, "c": STEPS}
    return [each for each in seen if each.point.round >= 0]


def test_the_sweep_comes_by_everything() -> None:
    kinds = Counter(each.point.event for each in points())
    # Per step: 3 machines; 2 microbatches through 3 stages, which take x and y, 2 values and a skip.
    assert kinds == {
        **{f"{verb} {kind}": 2 * 3 for verb in ("sends", "gets") for kind in ("begin_round", "round_report")},
        **{f"{verb} commit_round": 2 * 3 for verb in ("sends", "gets")},
        **{f"{verb} boundary": 2 * 2 * 8 for verb in ("sends", "gets")},
        **{f"{verb} tied_gradient": 2 * 2 for verb in ("sends", "gets")},
        **{"delivered": 2 * 2 * 8, "taken": 2 * 2 * 6, "finished": 2 * 2 * 6, "completed": 2 * 3},
    }


def check_loss(outcome: Outcome, seen: Seen, patience_s: float) -> None:
    """What holds when a machine with a stage is lost."""
    lost = seen.point.machine
    last_commit = seen.point.event == "gets commit_round" and seen.point.round == STEPS - 1
    if last_commit:
        assert (outcome.error, outcome.completed) == ("", STEPS), seen
    else:
        assert outcome.error.startswith(f"compnode {lost} (stage "), (seen, outcome)
        assert outcome.took_s <= patience_s, (seen, outcome)
    assert outcome.updates == dict.fromkeys(set("abc") - {lost}, outcome.completed), (seen, outcome)
    check_ending(outcome, seen, patience_s)


def check_ending(outcome: Outcome, seen: Seen, patience_s: float) -> None:
    assert outcome.ended_s <= patience_s + ENDING_S, (seen, outcome)
    assert all(len(reasons) == 1 for reasons in outcome.reasons.values()), (seen, outcome)


@pytest.mark.parametrize("machine", ["a", "b", "c"])
def test_a_machine_dies_at_every_point(machine: str) -> None:
    for seen in points():
        if seen.point.machine == machine:
            outcome, _ = run_with(kill, seen)
            check_loss(outcome, seen, RESET_S)


def test_a_machine_vanishes_at_many_points() -> None:
    for seen in points()[::5]:
        if seen.point.machine != OWNER:
            outcome, _ = run_with(vanish, seen)
            check_loss(outcome, seen, SILENCE_S)


def test_the_owner_dies_at_every_point() -> None:
    for fault, patience_s, chosen in ((kill, RESET_S, points()), (vanish, SILENCE_S, points()[::5])):
        for seen in chosen:
            if seen.point.machine == OWNER:
                outcome, _ = run_with(fault, seen)
                assert all(reasons[0].startswith("the owner's machine is lost") for reasons in outcome.reasons.values())
                # Of the step that was being told, or of the one before: an update that has not begun is dropped.
                assert set(outcome.updates.values()) <= {seen.point.round - 1, seen.point.round} - {-1}, (seen, outcome)
                check_ending(outcome, seen, patience_s)


def test_a_link_is_cut_at_every_message() -> None:
    for seen in points():
        if not seen.point.event.startswith("sends"):
            continue
        outcome, _ = run_with(cut, seen)
        ends = {seen.point.machine, seen.other} - {OWNER}
        last_commit = seen.point.event == "sends commit_round" and seen.point.round == STEPS - 1
        assert (
            not outcome.error
            if last_commit
            else outcome.error.startswith(tuple(f"compnode {end} (stage " for end in ends))
        ), (seen, outcome)
        patience_s = RESET_S if len(ends) == 1 else PATIENCE.neighbour_link_s + RESET_S
        assert outcome.took_s <= patience_s, (seen, outcome)
        expected = dict.fromkeys("abc", outcome.completed)
        if len(ends) == 1:  # the link to the owner, and perhaps a commit on it
            [end] = ends
            assert expected.pop(end) - outcome.updates.pop(end) in (0, 1), (seen, outcome)
        assert outcome.updates == expected, (seen, outcome)
        check_ending(outcome, seen, patience_s)


def test_a_shorter_break_than_the_grace_of_neighbours_is_made_good_by_nobody_but_ends_nothing() -> None:
    """Two machines whose link broke dial no new one by themselves; when something links them in time, the job goes on
    if no tensor was lost."""
    reference = Reference(three_machines())
    expected = [reference.train_step(batch(step, 2), [0.5, 0.5], 0.125) for step in range(STEPS)]

    async def main() -> None:
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(three_machines())
            [first] = await pool.train(driver, 1)
            pool.network.cut("a", "b")
            a, b = pool.machines["a"], pool.machines["b"]
            await pool.until(lambda: a.endpoint.link(b.peer) is None, within_s=1)
            await a.endpoint.connect(b.peer, [b.address], timeout_s=5)
            await asyncio.sleep(2 * PATIENCE.neighbour_link_s)
            [second] = await pool.train(driver, 1, first=1)
            assert [first.loss, second.loss] == expected
            assert await pool.tensors(driver) == reference.tensors()

    run_scripted(main())


def test_a_fault_can_be_told_in_a_sentence() -> None:
    """Machine b dies when it sends its third boundary of step 1: what later recovery will be tested by."""

    async def main() -> None:
        async with ScriptedPool(*NAMES) as pool:
            driver = await pool.launch(three_machines())
            pool.faults.at(Point("b", "sends boundary", round=1, nth=3), lambda _: pool.network.kill("b"))
            with pytest.raises(JobError, match=r"compnode b \(stage 1\) is lost"):
                await pool.train(driver, 4)
            assert [pool.machines[name].program.updates for name in "ac"] == [1, 1]

    run_scripted(main())
