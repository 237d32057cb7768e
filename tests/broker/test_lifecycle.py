"""The broker's life of a job on a scripted clock: who is waited for how long, who is told what, and who is freed.

The books are the real ones. Links are stubs that note what is told; nobody listens, and nothing is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from fusionai.broker.lifecycle import Lifecycle
from fusionai.broker.pool_state import PoolState
from fusionai.broker.records import JobRecord, MemberState, Preparation
from fusionai.errors import JobError, PeerLost, ProtocolError
from fusionai.network.clock import now_s, run_scripted
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobId
from fusionai.pool.messages import (
    Heartbeat,
    HeldShare,
    JobEnded,
    JobLost,
    JobProgress,
    PlanLost,
    RegisterMember,
    ReleaseShare,
)
from fusionai.scheduling.recovery import Patience

JOB = JobId("job")
NEXT = Epoch(1)
GRACE_S, RECOVERY_S = 30.0, 90.0
PATIENCE = Patience(broker_link_s=GRACE_S, broker_restart_s=RECOVERY_S)


def peer_of(name: str) -> PeerId:
    return PeerId(name * 64)


OWNER, A, B, C = (peer_of(name) for name in "0abc")
NAMES = {OWNER: "laptop", A: "a", B: "b", C: "c"}


class Line:
    """A link that notes what goes over it."""

    def __init__(self, told: list[tuple[str, msgspec.Struct]], name: str) -> None:
        self._told = told
        self._name = name
        self.stuck = False

    async def notify(self, kind: str, payload: bytes) -> None:
        if self.stuck:
            await asyncio.sleep(3600)
        known = (JobLost, PlanLost, ReleaseShare)
        [found] = [each for each in known if each.__struct_config__.tag == kind]
        self._told.append((self._name, msgspec.msgpack.decode(payload, type=found)))


class Lines:
    """The broker's endpoint."""

    peer_id = peer_of("f")

    def __init__(self) -> None:
        self.told: list[tuple[str, msgspec.Struct]] = []
        self.lines: dict[PeerId, Line] = {}

    def link(self, peer: PeerId) -> Line | None:
        return self.lines.get(peer)


class NoStore:
    def keep(self, record: msgspec.Struct) -> None: ...

    def drop(self, peer: PeerId) -> None: ...


class Prober:
    def __init__(self) -> None:
        self.considered: list[str] = []

    def consider(self, peer: PeerId) -> None:
        self.considered.append(NAMES[peer])


class Books:
    """A broker's books with an owner and compnodes a, b and c; a job of the owner runs on a and b."""

    def __init__(self) -> None:
        self.lines = Lines()
        state: Any = PoolState(self.lines, NoStore())  # type: ignore[arg-type]
        state.now_s = lambda: 1e9 + now_s()
        self.state: PoolState = state
        self.prober = Prober()
        self.lifecycle = Lifecycle(self.state, self.prober, patience=PATIENCE)  # type: ignore[arg-type]
        for peer in NAMES:
            self.come(peer)
        self.state.jobs.put(self.job())
        for peer in (A, B):
            self.state.registry.lease(peer, JOB)

    @staticmethod
    def job(**changes: Any) -> JobRecord:
        fields: dict[str, Any] = {
            "job": JOB,
            "name": "toy",
            "owner": OWNER,
            "owner_name": "laptop",
            "state": "running",
            "compnodes": {A: "a", B: "b"},
            "submitted_s": 0.0,
        }
        return JobRecord(**{**fields, **changes})

    def come(self, peer: PeerId) -> None:
        """A member registers."""
        role: Any = "owner" if peer == OWNER else "compnode"
        self.state.registry.register(peer, RegisterMember(NAMES[peer], role, None, ()), self.state.now_s())
        self.lines.lines[peer] = Line(self.lines.told, NAMES[peer])
        self.lifecycle.returned(peer)

    def go(self, peer: PeerId, why: str = "its link broke", *, for_good: bool = False) -> None:
        """A member's link is lost, or it leaves."""
        state: MemberState = "left" if for_good else "lost"
        self.state.registry.depart(peer, state, self.state.now_s())
        del self.lines.lines[peer]
        self.lifecycle.gone(peer, why, for_good=for_good)

    def prepare(self) -> None:
        """A plan on a and c is prepared."""
        plan: Any = None
        self.lifecycle.prepare(JOB, Preparation(epoch=NEXT, plan=plan, compnodes={A: "a", C: "c"}))

    @property
    def record(self) -> JobRecord:
        found = self.state.jobs.get(JOB)
        assert found is not None
        return found

    def held(self) -> set[str]:
        """Compnodes that a job has."""
        return {NAMES[peer] for peer in (A, B, C) if self.state.registry.job_of(peer) is not None}

    async def told(self) -> list[tuple[str, msgspec.Struct]]:
        """What members have been told since it was asked last."""
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        found, self.lines.told[:] = list(self.lines.told), []
        return found


def go(course: Callable[[Books], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        books = Books()
        await course(books)
        await books.state.tasks.close()

    run_scripted(main())


def holding(*shares: tuple[str, int]) -> Heartbeat:
    held = tuple(HeldShare(JobId(job), Epoch(epoch), "stage 1") for job, epoch in shares)
    return Heartbeat(busy=0.0, memory_bytes=0, holds=held, bytes_sent={})


# --- members that go ----------------------------------------------------------------------------------------------


def test_a_job_survives_a_machine_that_is_back_within_the_grace() -> None:
    async def course(books: Books) -> None:
        books.go(A)
        await asyncio.sleep(GRACE_S - 1)
        books.come(A)
        await asyncio.sleep(10 * GRACE_S)
        assert books.record.state == "running"
        assert await books.told() == []

    go(course)


def test_a_job_ends_when_a_machine_stays_away_for_the_grace() -> None:
    async def course(books: Books) -> None:
        books.state.registry.heartbeat(A, holding((JOB, 0)), books.state.now_s())
        books.go(A)
        await asyncio.sleep(GRACE_S - 0.1)
        assert books.record.state == "running"
        await asyncio.sleep(0.2)
        assert books.record.state == "failed"
        reason = books.record.reason
        assert reason == "compnode a (stage 1) is lost: its link broke"
        assert await books.told() == [
            ("laptop", JobLost(JOB, reason)),
            ("b", ReleaseShare(JOB, FIRST_EPOCH, reason)),
        ]
        assert books.held() == set()
        assert books.prober.considered == ["b"], "who is there and free may be probed"

    go(course)


def test_the_grace_counts_from_the_first_loss() -> None:
    """A machine whose link breaks again without its having registered is not waited for anew."""

    async def course(books: Books) -> None:
        books.go(A)
        await asyncio.sleep(GRACE_S / 2)
        books.lifecycle.gone(A, "again", for_good=False)
        await asyncio.sleep(GRACE_S / 2 + 0.1)
        assert "its link broke" in books.record.reason

    go(course)


def test_a_machine_that_leaves_for_good_is_not_waited_for() -> None:
    async def course(books: Books) -> None:
        books.go(B, "it quit", for_good=True)
        assert (books.record.state, books.record.reason) == ("failed", "compnode b is lost: it quit")

    go(course)


def test_the_loss_of_an_idle_machine_concerns_no_job() -> None:
    async def course(books: Books) -> None:
        books.go(C)
        await asyncio.sleep(10 * GRACE_S)
        books.come(C)
        books.go(C, "it quit", for_good=True)
        assert books.record.state == "running"

    go(course)


def test_a_lost_owner_ends_all_of_its_jobs() -> None:
    async def course(books: Books) -> None:
        books.state.jobs.put(books.job(job=JobId("other"), compnodes={C: "c"}))
        books.state.registry.lease(C, JobId("other"))
        books.go(OWNER)
        await asyncio.sleep(GRACE_S + 0.1)
        for job in (JOB, JobId("other")):
            record = books.state.jobs.get(job)
            assert record is not None
            assert (record.state, record.reason) == ("failed", "the owner laptop is lost: its link broke")
        assert books.held() == set()
        assert {name for name, _ in await books.told()} == {"a", "b", "c"}

    go(course)


# --- a plan that is prepared --------------------------------------------------------------------------------------


def test_a_prepared_plan_leases_its_machines_and_is_taken() -> None:
    async def course(books: Books) -> None:
        books.prepare()
        assert books.held() == {"a", "b", "c"}
        with pytest.raises(JobError, match="is prepared"):
            books.lifecycle.switch(JOB, Epoch(2))
        books.lifecycle.switch(JOB, NEXT)
        assert (books.record.compnodes, books.record.preparing, books.record.epoch) == ({A: "a", C: "c"}, None, NEXT)
        assert books.held() == {"a", "c"}
        told = await books.told()
        assert {name for name, _ in told} == {"b"}
        assert {message.epoch for _, message in told if isinstance(message, ReleaseShare)} == {FIRST_EPOCH, NEXT}
        with pytest.raises(JobError, match="is prepared"):
            books.lifecycle.switch(JOB, NEXT)

    go(course)


def test_the_loss_of_a_machine_of_the_prepared_plan_gives_up_that_plan_only() -> None:
    async def course(books: Books) -> None:
        books.prepare()
        books.go(C)
        await asyncio.sleep(GRACE_S + 0.1)
        assert (books.record.state, books.record.preparing) == ("running", None)
        assert books.held() == {"a", "b"}
        reason = "compnode c is lost: its link broke"
        assert await books.told() == [
            ("laptop", PlanLost(JOB, NEXT, reason)),
            ("laptop", ReleaseShare(JOB, NEXT, reason)),
            ("a", ReleaseShare(JOB, NEXT, reason)),
            ("b", ReleaseShare(JOB, NEXT, reason)),
        ]

    go(course)


def test_the_loss_of_a_machine_of_both_plans_ends_the_job() -> None:
    async def course(books: Books) -> None:
        books.prepare()
        books.go(A, "it quit", for_good=True)
        assert books.record.state == "failed"
        assert books.record.preparing is None
        assert books.held() == set()
        told = await books.told()
        assert ("laptop", JobLost(JOB, "compnode a is lost: it quit")) in told
        assert {(name, message.epoch) for name, message in told if isinstance(message, ReleaseShare)} == {
            ("laptop", NEXT),
            *((name, epoch) for name in "bc" for epoch in (FIRST_EPOCH, NEXT)),
        }

    go(course)


def test_forgetting_a_plan_that_is_not_there_does_nothing() -> None:
    async def course(books: Books) -> None:
        books.lifecycle.forget(JOB, "no", tell_owner=True)
        books.lifecycle.forget(JobId("unknown"), "no", tell_owner=True)
        assert await books.told() == []

    go(course)


# --- after a restart ------------------------------------------------------------------------------------------------


def test_after_a_restart_machines_have_longer_to_come_back() -> None:
    async def course(books: Books) -> None:
        books.lifecycle.recover()
        await asyncio.sleep(GRACE_S + 1)
        for peer in (OWNER, A):
            books.come(peer)
        await asyncio.sleep(RECOVERY_S - GRACE_S - 2)
        assert books.record.state == "running"
        await asyncio.sleep(2)
        assert books.record.reason == "compnode b is lost: it did not come back after the broker's restart"

    go(course)


def test_after_a_restart_a_job_whose_machines_return_goes_on() -> None:
    async def course(books: Books) -> None:
        for peer in (A, B):
            books.state.registry.release(peer, JOB)  # leases are not stored
        books.prepare()
        books.lifecycle.recover()
        assert books.record.preparing is None, "a plan that was being prepared is given up"
        for peer in (OWNER, A, B):
            books.come(peer)
        assert books.state.registry.job_of(A) == books.state.registry.job_of(B) == JOB
        await asyncio.sleep(10 * RECOVERY_S)
        assert books.record.state == "running"

    go(course)


def test_a_job_that_was_being_launched_when_the_broker_stopped_has_failed() -> None:
    async def course(books: Books) -> None:
        books.state.jobs.change(JOB, state="launching")
        books.lifecycle.recover()
        assert (books.record.state, books.record.reason) == (
            "failed",
            "the broker restarted while it launched the job",
        )
        await asyncio.sleep(10 * RECOVERY_S)

    go(course)


# --- what members say -----------------------------------------------------------------------------------------------


def test_a_machine_is_told_to_drop_what_it_should_not_hold() -> None:
    async def course(books: Books) -> None:
        books.state.jobs.put(books.job(job=JobId("old"), state="finished"))
        books.lifecycle.heartbeat(A, holding((JOB, 0), ("old", 0), ("unknown", 3), (JOB, 7)))
        assert await books.told() == [
            ("a", ReleaseShare(JobId("old"), FIRST_EPOCH, "it is finished")),
            ("a", ReleaseShare(JobId("unknown"), Epoch(3), "the broker does not know it")),
            ("a", ReleaseShare(JOB, Epoch(7), "its job goes on by another plan")),
        ]
        books.lifecycle.heartbeat(A, holding((JOB, 0)))
        assert await books.told() == []
        books.lifecycle.heartbeat(C, holding((JOB, 0)))
        assert await books.told() == [("c", ReleaseShare(JOB, FIRST_EPOCH, "its job goes on by another plan"))]

    go(course)


def test_a_machine_that_does_not_listen_is_told_one_thing_at_a_time() -> None:
    async def course(books: Books) -> None:
        books.lines.lines[A].stuck = True
        for _ in range(3):
            books.lifecycle.heartbeat(A, holding((JOB, 0), ("unknown", 0)))
        await asyncio.sleep(5)
        assert len(books.state.tasks._tasks) == 1
        await asyncio.sleep(10)  # given up after ten seconds
        books.lines.lines[A].stuck = False
        books.lifecycle.heartbeat(A, holding((JOB, 0), ("unknown", 0)))
        assert len(await books.told()) == 1

    go(course)


def test_a_machine_that_dropped_its_share_is_free() -> None:
    async def course(books: Books) -> None:
        books.lifecycle.heartbeat(A, holding())
        assert books.held() == {"b"}
        assert books.prober.considered == ["a"]
        assert books.record.state == "running", "the owner knows better, and tells"

    go(course)


@pytest.mark.parametrize("state", ["launching", "running"])
def test_a_machine_that_does_not_hold_its_share_yet_keeps_its_lease(state: str) -> None:
    async def course(books: Books) -> None:
        if state == "launching":
            books.state.jobs.change(JOB, state=state)
            books.lifecycle.heartbeat(A, holding())
            assert books.held() == {"a", "b"}
        else:
            books.prepare()
            books.lifecycle.heartbeat(C, holding())  # of the plan that is prepared
            assert books.held() == {"a", "b", "c"}

    go(course)


def test_progress_is_noted_at_most_twice_a_second_and_at_the_end() -> None:
    async def course(books: Books) -> None:
        for step in range(10):
            books.lifecycle.progress(OWNER, JobProgress(JOB, step, 100, 1.0 / (step + 1), 5.0))
            await asyncio.sleep(0.2)
        assert books.record.step == 9
        books.lifecycle.progress(OWNER, JobProgress(JOB, 99, 100, 0.5, 5.0))
        assert books.record.step == 9, "too soon"
        books.lifecycle.progress(OWNER, JobProgress(JOB, 100, 100, 0.5, 5.0))
        assert (books.record.step, books.record.loss) == (100, 0.5)

    go(course)


def test_the_owner_ends_its_job_once() -> None:
    async def course(books: Books) -> None:
        books.lifecycle.ended(OWNER, JobEnded(JOB, "finished", "all steps are done"))
        assert books.record.state == "finished"
        assert [name for name, _ in await books.told()] == ["a", "b"], "the owner knows"
        books.lifecycle.ended(OWNER, JobEnded(JOB, "failed", "too late"))
        assert books.record.reason == "all steps are done"
        books.lifecycle.progress(OWNER, JobProgress(JOB, 1, 100, 1.0, 1.0))
        assert books.record.step == 0

    go(course)


@pytest.mark.parametrize(("peer", "job"), [(A, JOB), (OWNER, JobId("unknown"))])
def test_only_its_owner_speaks_for_a_job(peer: PeerId, job: JobId) -> None:
    async def course(books: Books) -> None:
        with pytest.raises(ProtocolError, match=f"{NAMES[peer]} owns no job"):
            books.lifecycle.ended(peer, JobEnded(job, "finished", ""))
        with pytest.raises(ProtocolError, match="owns no job"):
            books.lifecycle.progress(peer, JobProgress(job, 1, 2, 0.0, 0.0))

    go(course)


def test_an_owner_without_jobs_is_not_waited_for_any_longer() -> None:
    async def course(books: Books) -> None:
        books.go(OWNER)
        books.lifecycle.finish(JOB, "cancelled", "somebody did")
        await asyncio.sleep(10 * GRACE_S)
        assert books.record.reason == "somebody did"
        assert not books.state.tasks._tasks

    go(course)


def test_a_member_without_a_link_misses_what_it_is_told() -> None:
    async def course(books: Books) -> None:
        with pytest.raises(PeerLost):
            books.state.link(peer_of("9"))
        books.go(A)
        books.lifecycle.finish(JOB, "cancelled", "")
        assert [name for name, _ in await books.told()] == ["laptop", "b"]

    go(course)
