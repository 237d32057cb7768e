"""What makes an owner look for another plan."""

from __future__ import annotations

from typing import Any

import pytest
from decoder_graph import decoder, member, pool
from every_plan import OWNER, planned

from fusionai.execution.plane import ProgramOptions
from fusionai.owner.plan_seeking import PlanSeeker
from fusionai.owner.plan_terms import PlanTerms
from fusionai.pool.identifiers import FIRST_EPOCH, JobId
from fusionai.scheduling.plan import Plan
from fusionai.training.driver import RoundResult
from fusionai.training.messages import RoundReport

GRAPH = decoder(12)
PLAN = planned(GRAPH, pool(member("a"), member("b"), owner=OWNER), 8, compnodes=2)
JOB = JobId("toy")


def result(plan: Plan, microbatches: int) -> RoundResult:
    """Return what a step of so many microbatches gives when every machine is as fast as planned."""
    reports = {
        peer: RoundReport(
            job=JOB,
            epoch=FIRST_EPOCH,
            round=0,
            losses={},
            norms={},
            busy_s=0.0,
            wall_s=0.0,
            bytes_sent={},
            memory_bytes=0,
            forward_s={each.stage: microbatches * each.predicted.forward_s for each in plan.stages_of(peer)},
            backward_s={each.stage: microbatches * each.predicted.backward_s for each in plan.stages_of(peer)},
        )
        for peer in plan.peers
    }
    return RoundResult(1.0, 1.0, 1.0, 1.0, reports, {}, microbatches)


@pytest.mark.parametrize("microbatches", [8, 2])
def test_a_step_of_fewer_microbatches_shows_no_faster_machine(microbatches: int) -> None:
    """Microbatches in which nothing counts are not run."""
    terms = PlanTerms(
        graph=GRAPH,
        graph_hash=PLAN.graph_hash,
        sizes=PLAN.sizes,
        privacy="open",
        microbatches=microbatches,
        front=0,
        back=len(GRAPH.nodes),
        options=ProgramOptions(),
        compnodes=2,
        steps=100,
        allowed=True,
    )
    nobody: Any = None
    seeker = PlanSeeker(terms, nobody, JOB, PLAN, str)
    for step in range(8):
        seeker.observe(step, result(PLAN, microbatches))
    assert seeker._corrections.factors() == pytest.approx(dict.fromkeys(PLAN.peers, 1.0))
