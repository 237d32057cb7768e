"""What of a broker's plan the owner refuses, besides what tests/broker/test_hostile_broker.py plays through."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from decoder_graph import decoder
from msgspec.structs import replace

from fusionai.errors import JobError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.encoding import content_hash
from fusionai.graph.privacy import arrange_private, raw_values
from fusionai.network.identity import PeerId
from fusionai.owner.plan_check import accepted, accepted_next, check_job_id
from fusionai.owner.plan_terms import PlanTerms
from fusionai.pool.identifiers import Epoch, JobId
from fusionai.pool.messages import PlanPrepared
from fusionai.scheduling.plan import PRIVATE_LINE, PipelinePlan, Plan, StagePlan, StagePrediction

ME, A, B = PeerId("0" * 64), PeerId("a" * 64), PeerId("b" * 64)
NAMES = {ME: "owner", A: "anna", B: "berta"}
GRAPH, FRONT, BACK = arrange_private(decoder(2))
MIDDLE = (FRONT + BACK) // 2
N = len(GRAPH.nodes)


def terms(**changes: Any) -> PlanTerms:
    fields: dict[str, Any] = {
        "graph": GRAPH,
        "graph_hash": content_hash(GRAPH),
        "front": FRONT,
        "back": BACK,
        "sizes": {"s0": 2, "s1": 8},
        "privacy": "private",
        "options": ProgramOptions(),
        "compnodes": 0,
        "steps": 10,
        "microbatches": 4,
        "allowed": True,
    }
    return PlanTerms(**{**fields, **changes})


def plan_of(*stages: tuple[PeerId, int, int]) -> Plan:
    predicted = StagePrediction(forward_s=0.1, backward_s=0.2, update_s=0.1, memory_bytes=100, send_s=0.1)
    made = tuple(StagePlan(place, *each, in_flight=2, predicted=predicted) for place, each in enumerate(stages))
    return Plan(
        graph_hash=content_hash(GRAPH),
        sizes={"s0": 2, "s1": 8},
        microbatches=4,
        privacy="private",
        owner=ME,
        pipelines=(PipelinePlan(made, 4, 1.0),),
        end_of_step_s=0.1,
        predicted_step_s=1.1,
        bottleneck="computing on anna",
        explanation=("stage 0 on owner",),
    )


GOOD = plan_of((ME, 0, FRONT), (A, FRONT, MIDDLE), (B, MIDDLE, BACK), (ME, BACK, N))


def with_pipeline(**changes: Any) -> Plan:
    return replace(GOOD, pipelines=(replace(GOOD.only_pipeline(), **changes),))


def with_stage(place: int, **changes: Any) -> Plan:
    stages = list(GOOD.stages)
    stages[place] = replace(stages[place], **changes)
    return with_pipeline(stages=tuple(stages))


def with_prediction(place: int, **changes: Any) -> Plan:
    return with_stage(place, predicted=replace(GOOD.stages[place].predicted, **changes))


def test_a_plan_that_keeps_to_the_terms_is_accepted() -> None:
    found = accepted(terms(), GOOD, NAMES, ME)
    assert found == replace(GOOD, explanation=("stage 0 on owner", PRIVATE_LINE))
    for allowed in (
        terms(compnodes=2, machines=("anna", "berta")),
        terms(cuts=(MIDDLE,), machines=("anna", "berta")),
    ):
        assert accepted(allowed, GOOD, NAMES, ME).stages == GOOD.stages


def test_an_owner_may_hold_more_than_it_must() -> None:
    plan = plan_of((ME, 0, MIDDLE), (A, MIDDLE, BACK), (ME, BACK, N))
    assert accepted(terms(), plan, NAMES, ME).stages == plan.stages


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (replace(GOOD, graph_hash="0" * 64), "another model"),
        (replace(GOOD, sizes={"s0": 2, "s1": 9}), "its sizes are"),
        (replace(GOOD, microbatches=5), "its microbatches are 5, submitted were 4"),
        (replace(GOOD, privacy="open"), "its privacy is|its privacy are"),
        (replace(GOOD, owner=A), "names 'aaaaaaaaaaaa' as the owner"),
        (replace(GOOD, owner=""), "as the owner"),
        (replace(GOOD, pipelines=GOOD.pipelines * 2), "2 pipelines"),
        (replace(GOOD, pipelines=()), "0 pipelines"),
        (with_pipeline(stages=()), "no stage"),
        (with_pipeline(microbatches=3), "takes 3 of 4"),
        (with_stage(1, peer="A" * 64), "stage 1 belongs to 'AAAAAAAAAAAA', which is no key"),
        (with_stage(1, peer="a" * 63), "no key"),
        (with_stage(1, peer="\x1b]0;" + "a" * 60), "stage 1 belongs to ' .0;aaaaaaaa'"),
        (with_stage(1, stage=2), "stage 1 is numbered 2"),
        (with_stage(1, in_flight=0), "holds 0 microbatches"),
        (with_stage(1, in_flight=5), "holds 5 microbatches"),
        (with_stage(1, stop=MIDDLE + 1), "cover the model's"),
        (with_stage(0, start=-1), "cover the model's"),
        (with_stage(3, stop=N + 1), "cover the model's"),
        (with_stage(3, stop=N - 1), "cover the model's"),
        (plan_of((ME, 0, FRONT), (A, FRONT, FRONT), (B, FRONT, BACK), (ME, BACK, N)), "cover the model's"),
        (
            plan_of((ME, 0, FRONT), (A, FRONT, BACK), (B, BACK, N)),
            f"stage 2 .operators {BACK} to {N}. would run on berta",
        ),
        (plan_of((A, 0, BACK), (ME, BACK, N)), f"stage 0 .operators 0 to {BACK}. would run on anna .aaaaaaaaaaaa."),
        (plan_of((ME, 0, FRONT), (A, FRONT, BACK + 1), (ME, BACK + 1, N)), "stage 1"),
        (with_prediction(1, forward_s=math.nan), "times that are none"),
        (with_prediction(1, backward_s=math.inf), "times that are none"),
        (with_prediction(1, send_s=-1.0), "times that are none"),
        (with_prediction(1, update_s=1e300), "times that are none"),
        (with_prediction(1, memory_bytes=-1), "stage 1 would need -1 bytes"),
        (replace(GOOD, predicted_step_s=math.nan), "times that are none"),
        (replace(GOOD, end_of_step_s=-0.1), "times that are none"),
        (replace(GOOD, bound_step_s=math.nan), "times that are none"),
        (with_pipeline(predicted_s=math.inf), "times that are none"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(plan: Plan, says: str) -> None:
    with pytest.raises(JobError, match=says) as caught:
        accepted(terms(), plan, NAMES, ME)
    assert "the broker's plan is refused, and nothing was sent by it" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (terms(compnodes=1), "uses 2 compnodes, placement.compnodes asks for 1"),
        (terms(compnodes=3), "asks for 3"),
        (terms(machines=("anna",)), "stage 2 would run on berta .bbbbbbbbbbbb., which is none of placement.machines"),
        (terms(cuts=(MIDDLE + 1,)), "placement.cuts asks for"),
        (terms(cuts=(MIDDLE,), machines=("berta", "anna")), "order of placement.machines"),
    ],
)
def test_a_plan_that_uses_other_machines_or_cuts_is_refused(wanted: PlanTerms, says: str) -> None:
    with pytest.raises(JobError, match=says):
        accepted(wanted, GOOD, NAMES, ME)


def test_a_machine_without_a_name_is_none_of_those_allowed() -> None:
    with pytest.raises(JobError, match=r"stage 2 would run on bbbbbbbbbbbb, which is none of placement\.machines"):
        accepted(terms(machines=("anna", "berta")), GOOD, {ME: "owner", A: "anna"}, ME)


@pytest.mark.parametrize(
    "names",
    [
        {**NAMES, A: "anna\x1b[2J"},
        {**NAMES, A: "a" * 100},
        {**NAMES, A: ""},
        {**NAMES, A: "[red]anna"},
        {**NAMES, A: "berta"},
        {**NAMES, "x": "carla"},
    ],
)
def test_names_that_are_none_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(JobError, match="refused"):
        accepted(terms(), GOOD, names, ME)


def test_texts_are_harmless_for_a_terminal() -> None:
    plan = replace(GOOD, bottleneck="a\x1b[2Jb", explanation=("c\rd", *["line"] * 5000))
    found = accepted(terms(), plan, NAMES, ME)
    assert found.bottleneck == "a [2Jb"
    assert found.explanation[0] == "c d"
    assert len(found.explanation) <= 1001


def open_terms(**changes: Any) -> PlanTerms:
    return terms(privacy="open", front=0, back=N, **changes)


def test_an_open_job_may_run_anywhere() -> None:
    plan = replace(plan_of((A, 0, MIDDLE), (B, MIDDLE, N)), privacy="open", owner="")
    assert PRIVATE_LINE not in accepted(open_terms(), plan, NAMES, ME).explanation


def test_what_shows_raw_data_is_refused_even_if_the_front_is_said_to_be_smaller() -> None:
    """The second line of defence: where the pinned part is wrong, what crosses is looked at."""
    nothing_pinned = terms(front=0, back=N)
    with pytest.raises(JobError, match=r"stage 0 on anna .aaaaaaaaaaaa. would get 'ids', which shows raw data"):
        accepted(nothing_pinned, plan_of((A, 0, BACK), (ME, BACK, N)), NAMES, ME)
    assert {"ids", "labels", GRAPH.loss} <= raw_values(GRAPH, train=True)


# --- a plan that follows another one ----------------------------------------------------------------------------------


def prepared(**changes: Any) -> PlanPrepared:
    return msgspec.structs.replace(PlanPrepared("better", Epoch(2), GOOD, NAMES, gain_s=3.0, move_s=1.0), **changes)


def test_a_later_plan_is_checked_like_the_first() -> None:
    assert accepted_next(terms(), prepared(), ME, after=Epoch(1)).stages == GOOD.stages
    hostile = prepared(plan=plan_of((A, 0, BACK), (ME, BACK, N)))
    for bad in (
        hostile,
        prepared(epoch=Epoch(1)),
        prepared(epoch=Epoch(0)),
        prepared(gain_s=math.nan),
        prepared(move_s=math.inf),
        prepared(move_s=-1.0),
    ):
        with pytest.raises(JobError, match="refused"):
            accepted_next(terms(), bad, ME, after=Epoch(1))


@pytest.mark.parametrize("job", ["", "a" * 100, "../../x", "a\x1b[2J"])
def test_a_job_is_called_by_a_name(job: str) -> None:
    check_job_id(JobId("7d6039129703"))
    with pytest.raises(JobError, match="no name"):
        check_job_id(JobId(job))
