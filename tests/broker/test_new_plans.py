"""A running job goes over to a plan chosen by the test: real broker, members, programs and sockets, in one process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from broker_pool import first_plan, held, status, until
from job_party import WEIGHT_BYTES, Party, run, undisturbed

from fusionai.errors import JobError
from fusionai.pool.identifiers import Epoch, JobEpoch
from fusionai.pool.messages import JobEnded, SwitchPlan
from fusionai.tensor import TensorData
from fusionai.training.messages import WeightTensor
from fusionai.training.roster import Roster
from fusionai.training.weight_traffic import WeightTraffic


@pytest.mark.parametrize(
    ("cuts", "names", "moved"),
    [
        ((1,), ("first", "second"), 1),
        ((2,), ("second", "first"), 4),
        ((2,), ("c", "second"), 2),
        ((1, 3), ("first", "c", "second"), 2),
        ((), ("c",), 4),
        ((2,), ("first", "owner"), 2),
    ],
    ids=["one layer", "exchanged", "a newcomer for one", "a newcomer between", "all to a newcomer", "the owner"],
)
def test_nothing_but_the_places_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, ...], names: tuple[str, ...], moved: int
) -> None:
    async def course(party: Party) -> None:
        await party.steps(3)
        chosen = [{"first": party.first, "second": party.second}.get(name, name) for name in names]
        prepared = await party.prepare(cuts, chosen)
        assert prepared.epoch == 1
        await party.steps(1)  # the job steps on by the old plan
        event = await party.take()
        assert (event.error, event.bytes_moved) == (None, moved * 3 * WEIGHT_BYTES)
        expected = {name: "working" if name in chosen else "idle" for name in "abc"}
        assert await party.states() == expected
        await party.steps(2)
        for name, member in party.members.items():
            expected_plans = [JobEpoch(party.launched.job, Epoch(1))] if name in chosen else []
            await until(lambda member=member, plans=expected_plans: held(member) == plans)  # type: ignore[misc]
        await asyncio.sleep(0.3)  # three heartbeats
        assert await party.states() == expected
        assert [each.state for each in (await status(party.owner)).jobs] == ["running"]

    losses, weights = run(tmp_path / "one", monkeypatch, course)
    expected_losses, expected_weights = run(tmp_path / "other", monkeypatch, undisturbed)
    assert losses == expected_losses
    assert weights == expected_weights
    assert any(any(data) for (_, state), data in weights.items() if state is not None)


def test_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def course(party: Party) -> None:
        await party.steps(2)
        for cuts, names in (((1,), ("a", "c")), ((3,), ("c", "b")), ((2,), ("b", "a"))):
            await party.prepare(cuts, names)
            assert (await party.take()).error is None
            await party.steps(1)
        await party.steps(1)
        await party.owner.request(JobEnded(party.launched.job, "finished", ""), None, timeout_s=60)
        assert await party.states() == dict.fromkeys("abc", "idle")

    losses, _ = run(tmp_path / "one", monkeypatch, lambda party: ended(party, course))
    assert losses == run(tmp_path / "other", monkeypatch, undisturbed)[0]


async def ended(party: Party, course: Callable[[Party], Awaitable[None]]) -> None:
    await course(party)
    for member in party.members.values():
        await until(lambda member=member: not member.holds)  # type: ignore[misc]

    async def nothing() -> dict[tuple[str, str | None], bytes]:
        return {}

    party.weights = nothing  # type: ignore[method-assign]


def test_a_newcomer_that_dies_in_the_hand_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies after the first tensor came; the job goes on with the old plan, and computes what it should."""

    async def course(party: Party) -> None:
        await party.steps(3)
        prepared = await party.prepare((2,), (party.first, "c"))
        take = WeightTraffic.take
        came = 0
        closing: list[asyncio.Future[None]] = []

        async def dying(
            self: WeightTraffic, roster: Roster, peer: Any, header: WeightTensor, tensor: TensorData
        ) -> None:
            nonlocal came
            if header.epoch == prepared.epoch and self._wire.me == party.peer("c"):
                came += 1
                if came == 2:
                    closing.append(asyncio.ensure_future(party.members["c"].endpoint.close()))
                    await asyncio.sleep(1)
            await take(self, roster, peer, header, tensor)

        monkeypatch.setattr(WeightTraffic, "take", dying)
        event = await party.take()
        assert event.error is not None
        gone = f"c .*ended the link|compnode c|no link to {party.peer('c')[:12]}"
        assert re.search(gone, event.error)
        monkeypatch.setattr(WeightTraffic, "take", take)
        await party.driver.watch.check()
        await party.steps(3)
        for name in "ab":
            await until(lambda name=name: held(party.members[name]) == [first_plan(party.launched)])  # type: ignore[misc]
        found = await party.states()
        assert (found["a"], found["b"]) == ("working", "working")

    disturbed = run(tmp_path / "one", monkeypatch, course)
    assert disturbed == run(tmp_path / "other", monkeypatch, undisturbed)


def test_a_newcomer_that_goes_before_the_hand_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def course(party: Party) -> None:
        await party.steps(3)
        prepared = await party.prepare((2,), (party.first, "c"))
        assert (await party.states())["c"] == "working"
        await party.members["c"].close()
        assert (await party.take()).error is not None
        assert prepared.epoch is not None
        with pytest.raises(JobError, match=r"no plan .* is prepared"):
            await party.owner.request(SwitchPlan(party.launched.job, prepared.epoch), None, timeout_s=60)
        await party.steps(3)

    assert run(tmp_path / "one", monkeypatch, course) == run(tmp_path / "other", monkeypatch, undisturbed)


@pytest.mark.parametrize(("machines", "offered"), [((), {"a", "b", "c"}), (("a", "b"), {"a", "b"})])
def test_only_named_machines_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: tuple[str, ...], offered: set[str]
) -> None:
    async def course(party: Party) -> None:
        await party.steps(1)
        await party.prepare((1,), (party.first, party.second))
        assert party.offered == offered
        assert (await party.take()).error is None
        await party.steps(5)

    found = run(tmp_path / "one", monkeypatch, course, machines=machines)
    assert found == run(tmp_path / "other", monkeypatch, undisturbed)


def test_a_share_must_fit_beside_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def course(party: Party) -> None:
        need = sum(stage.predicted.memory_bytes for stage in party.launched.plan.stages_of(party.peer(party.first)))
        assert need <= 5000 < 2 * need, need
        await party.steps(1)
        prepared = await party.prepare((2,), (party.first, party.second))
        assert prepared.epoch is None
        assert "beside each other" in prepared.reason
        assert await party.running.between_steps(party.done) is None
        await party.steps(5)

    run(tmp_path, monkeypatch, course, memory_bytes=5000)
