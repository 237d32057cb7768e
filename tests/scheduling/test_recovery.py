"""What a job does about events: a table of every case, and what holds of all of them."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionai.scheduling import job_events, recovery
from fusionai.scheduling.job_events import (
    FIXED_PLAN,
    Came,
    Failed,
    GivenUp,
    JobEvent,
    Left,
    LinkLost,
    Lost,
    Misreported,
    PlanFailed,
    Slow,
    Stalled,
    WishesToGo,
    refusal,
    sentence,
)
from fusionai.scheduling.recovery import (
    PATIENCE,
    Action,
    AskForPlan,
    DropPlan,
    DropShare,
    EndJob,
    JobView,
    LookAgain,
    RefuseRelief,
    decide,
)

BROKER = JobView(
    seen_by="broker", patience=PATIENCE, owner="o", machines=frozenset({"a", "b"}), prepared=frozenset({"c"})
)
DRIVER = JobView(seen_by="driver", patience=PATIENCE, driver="o")
STAGE = JobView(seen_by="stage", patience=PATIENCE, owner="o", driver="d", machines=frozenset({"a", "d"}))
PLANNING = replace(DRIVER, may_replan=True, left_s=100.0)

GONE, LEFT = Lost("a", "reset"), Left("a", "it stopped")
CUT, BROKEN = LinkLost("b", "a", "reset"), LinkLost("b", "a", "nonsense", broke_rules=True)
WISH, FAILURE = WishesToGo("anna"), PlanFailed("no memory")


def stalled(waited_s: float, longest_s: float = 0.0) -> Stalled:
    return Stalled(("a", "b"), "report", waited_s, longest_s)


@pytest.mark.parametrize(("view", "event", "actions"), [
    # A machine away from the broker.
    (BROKER, GONE, [LookAgain(5.0)]),
    (replace(BROKER, waited_s=5.0), GONE, [EndJob(GONE)]),
    (replace(BROKER, waited_s=5.0, mended=True), GONE, []),
    (replace(BROKER, restarted=True, waited_s=5.0), GONE, [LookAgain(85.0)]),
    (replace(BROKER, restarted=True, waited_s=90.0), GONE, [EndJob(GONE)]),
    (BROKER, LEFT, [EndJob(LEFT)]),
    (BROKER, Left("o", "bye"), [EndJob(Left("o", "bye"))]),
    (BROKER, Lost("c", "reset"), [LookAgain(5.0)]),
    (BROKER, Left("c", "bye"), [DropPlan(Left("c", "bye"))]),
    (BROKER, Left("stranger", "bye"), []),
    # A link of the driver.
    (DRIVER, LinkLost("o", "a", "reset"), [EndJob(GONE)]),
    (replace(DRIVER, mended=True), LinkLost("o", "a", "reset"), [EndJob(GONE)]),
    (STAGE, LinkLost("b", "d", "reset"), [DropShare(Lost("d", "reset"))]),
    (STAGE, LinkLost("b", "d", "nonsense", broke_rules=True), [DropShare(Lost("d", "nonsense"))]),
    # A link between two stages.
    (STAGE, CUT, [LookAgain(5.0)]),
    (replace(STAGE, waited_s=5.0), CUT, [EndJob(CUT)]),
    (replace(STAGE, waited_s=5.0, mended=True), CUT, []),
    (STAGE, BROKEN, [EndJob(BROKEN)]),
    (replace(STAGE, mended=True), BROKEN, []),
    (STAGE, LinkLost("b", "stranger", "reset"), []),
    # Machines that live.
    (DRIVER, stalled(10.0), [LookAgain(290.0)]),
    (DRIVER, stalled(300.0), [EndJob(stalled(300.0))]),
    (DRIVER, stalled(300.0, longest_s=30.0), [LookAgain(300.0)]),
    (DRIVER, Stalled(("a",), "tensor", 0.0), [LookAgain(3600.0)]),
    (DRIVER, Failed("a", "out of memory"), [EndJob(Failed("a", "out of memory"))]),
    (DRIVER, Misreported("a", "a lie"), [EndJob(Misreported("a", "a lie"))]),
    (DRIVER, GivenUp("over"), [EndJob(GivenUp("over"))]),
    # Another plan.
    (PLANNING, Slow("a", 2.0, 3), [AskForPlan()]),
    (PLANNING, Came(("c",)), [AskForPlan()]),
    (PLANNING, FAILURE, [AskForPlan()]),
    (replace(PLANNING, paused=True), Slow("a", 2.0, 3), []),
    (replace(PLANNING, paused=True), Came(("c",)), []),
    (replace(PLANNING, paused=True), FAILURE, []),
    (replace(PLANNING, left_s=10.0), Came(("c",)), []),
    (replace(PLANNING, may_replan=False), Came(("c",)), []),
    (replace(PLANNING, paused=True), WISH, [AskForPlan()]),
    (replace(PLANNING, left_s=10.0), WISH, []),
    (replace(PLANNING, may_replan=False), WISH, [RefuseRelief(WISH)]),
    (replace(PLANNING, relieving=True, attempts=2, paused=True), FAILURE, [AskForPlan()]),
    (replace(PLANNING, relieving=True, attempts=3), FAILURE, [RefuseRelief(FAILURE)]),
    (replace(PLANNING, relieving=True, attempts=1, hopeless=True), FAILURE, [RefuseRelief(FAILURE)]),
])  # fmt: skip
def test_table(view: JobView, event: JobEvent, actions: list[Action]) -> None:
    assert list(decide(view, event)) == actions


SECONDS = st.floats(0, 1e6)
PEER = st.sampled_from("oabcd")
EVENTS: st.SearchStrategy[JobEvent] = st.one_of(
    st.builds(Lost, PEER, st.just("x")),
    st.builds(Left, PEER, st.just("x")),
    st.builds(LinkLost, PEER, PEER, st.just("x"), st.booleans()),
    st.builds(Stalled, st.just(("a",)), st.sampled_from(["report", "tensor"]), SECONDS, SECONDS),
    st.builds(Failed, PEER, st.just("x")),
    st.builds(Misreported, PEER, st.just("x")),
    st.builds(GivenUp, st.just("x")),
    st.builds(Slow, PEER, st.floats(0.1, 10), st.integers(0, 10)),
    st.builds(Came, st.just(("c",)), st.integers(0, 3)),
    st.builds(WishesToGo, st.just("anna")),
    st.builds(PlanFailed, st.just("x")),
)
VIEWS = st.builds(
    JobView,
    seen_by=st.sampled_from(["broker", "driver", "stage"]),
    patience=st.just(PATIENCE),
    owner=st.just("o"),
    driver=st.sampled_from("od"),
    machines=st.just(frozenset("ab")),
    prepared=st.just(frozenset("c")),
    waited_s=SECONDS,
    mended=st.booleans(),
    restarted=st.booleans(),
    may_replan=st.booleans(),
    left_s=SECONDS,
    paused=st.booleans(),
    relieving=st.booleans(),
    attempts=st.integers(0, 5),
    hopeless=st.booleans(),
)


@given(VIEWS, EVENTS)
def test_whoever_looks_again_comes_to_an_end(view: JobView, event: JobEvent) -> None:
    for _ in range(5):
        waits = [action.seconds for action in decide(view, event) if isinstance(action, LookAgain)]
        if not waits:
            return
        assert len(waits) == 1
        assert waits[0] > 0
        view = replace(view, waited_s=view.waited_s + waits[0])
        if isinstance(event, Stalled):
            event = replace(event, waited_s=event.waited_s + waits[0])
    raise AssertionError("it waits for ever")


@given(VIEWS, EVENTS)
def test_a_job_ends_for_one_reason_and_nothing_comes_after(view: JobView, event: JobEvent) -> None:
    actions = decide(view, event)
    ends = [action for action in actions if isinstance(action, (EndJob, DropShare))]
    assert not ends or actions == (ends[0],)
    if ends:
        assert sentence(ends[0].because, name=str, who=str)


@given(VIEWS, EVENTS)
def test_a_wish_or_a_plan_never_ends_a_job(view: JobView, event: JobEvent) -> None:
    if isinstance(event, (Slow, Came, WishesToGo, PlanFailed)):
        assert all(isinstance(action, (AskForPlan, RefuseRelief)) for action in decide(view, event))


def test_pauses_double() -> None:
    assert [PATIENCE.pause_after(sought) for sought in (0, 1, 2, 6, 7, 1000)] == [10, 20, 40, 640, 640, 640]
    assert replace(PATIENCE, pause_steps=0).pause_after(5) == 0
    assert replace(PATIENCE, pause_steps=1000).pause_after(5) == 1000


@pytest.mark.parametrize(("event", "text"), [
    (GONE, "compnode anna (stage 1) is lost: reset"),
    (Left("a", "it left the pool (bye)"), "compnode anna (stage 1) is lost: it left the pool (bye)"),
    (CUT, "its link to compnode anna is gone: reset"),
    (Stalled(("a", "b"), "report", 300.0), "no report from compnode anna, b for 300 s: it is stalled"),
    (Stalled(("a",), "tensor", 3600.0), "compnode anna sent no tensor for 3600 s: it is stalled"),
    (Failed("a", "out of memory"), "compnode anna (stage 1) failed: out of memory"),
    (Misreported("a", "a norm of -1"), "compnode anna (stage 1) reports a norm of -1"),
    (GivenUp("the owner is lost"), "the owner is lost"),
    (Slow("a", 2.0, 3), "anna takes 2.00 times as long as planned since step 4"),
    (Came(("c", "d")), "c, d joined"),
    (Came(("c", "d"), 7), "c, d and 7 more joined"),
    (WISH, "anna wants to leave"),
])  # fmt: skip
def test_sentences(event: JobEvent, text: str) -> None:
    def name(peer: str) -> str:
        return {"a": "anna"}.get(peer, peer)

    assert sentence(event, name=name, who=lambda peer: f"compnode {name(peer)} (stage 1)") == text


def test_why_nobody_is_relieved() -> None:
    assert refusal(WISH) == FIXED_PLAN
    assert refusal(FAILURE) == "no memory"


@pytest.mark.parametrize("module", [job_events, recovery])
def test_no_clock_and_no_input(module: Any) -> None:
    """The simulator goes by the same policy, in its own time."""
    tree = ast.parse(inspect.getsource(module))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    allowed = {"__future__", "collections.abc", "dataclasses", "typing", "fusionai.scheduling.job_events"}
    assert imported <= allowed
