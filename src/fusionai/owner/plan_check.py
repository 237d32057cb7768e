"""Whether a plan from the broker, and this machine's share of it, keep to what the owner asked for. Pure.

A plan says to whom the owner sends weights, inputs and boundary tensors, so the broker could read a private job by
planning it: a compnode as holder of the first stage is fed the tokens. The owner therefore checks every plan, the first
one and each that is to follow it, and its own share of it, before anything goes to anybody. The broker's word is taken
only for what cannot be checked here: which key belongs to a machine's name, and how fast a machine is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise

from msgspec.structs import replace

from fusionai.errors import ConfigError, GraphError, JobError, PlacementError, ProtocolError
from fusionai.graph.cuts import cut
from fusionai.graph.encoding import encode_subdag
from fusionai.graph.evaluation import face
from fusionai.graph.model import SubDag
from fusionai.graph.privacy import raw_values
from fusionai.network.identity import PeerId, public_key_bytes
from fusionai.owner.plan_terms import PlanTerms
from fusionai.pool.identifiers import Epoch, JobId
from fusionai.pool.messages import PlanPrepared
from fusionai.pool.names import check_name
from fusionai.scheduling.plan import PRIVATE_LINE, Plan, StagePlan
from fusionai.training.assignment_parcels import Assignment
from fusionai.training.reports import printable
from fusionai.training.roster import tied_holders

_MOST_S = 1e15
"""Most seconds that a prediction may name. Gigabytes over a link of a byte per second, a thousand times, take 1e12."""
_MOST_BYTES = 1 << 60
_MOST_LINES = 1000
"""Most lines of a plan's explanation that are kept."""


def accepted(terms: PlanTerms, plan: Plan, names: Mapping[str, str], me: PeerId) -> Plan:
    """Return a plan that keeps to the terms, its texts made harmless for a terminal.

    Args:
        terms: what the owner asked for.
        plan: what the broker answered.
        names: the machines' names by peer, as the broker says.
        me: the owner's machine.

    Raises:
        JobError: the plan breaks the terms, or a rule of plans; the text names the stage and the peer.
    """
    _check_names(names)
    _check_as_submitted(terms, plan, me)
    stages = _stages(terms, plan)
    who = _Names(names, me)
    _check_holders(terms, stages, who)
    _check_figures(plan, stages)
    try:
        subdags = cut(terms.graph, plan.cuts)
    except GraphError as error:
        raise _refused(f"its cuts do not suit the model: {error}") from error
    if terms.privacy == "private":
        _check_private(terms, stages, subdags, who)
    lines = tuple(map(printable, plan.explanation[:_MOST_LINES]))
    if terms.privacy == "private" and PRIVATE_LINE not in lines:
        lines = (*lines, PRIVATE_LINE)
    return replace(plan, bottleneck=printable(plan.bottleneck), explanation=lines)


def accepted_next(terms: PlanTerms, prepared: PlanPrepared, me: PeerId, *, after: Epoch) -> Plan:
    """Return the plan that is prepared to follow a running one of the epoch `after`; see `accepted`."""
    if prepared.plan is None or prepared.epoch is None or prepared.epoch <= after:
        raise _refused(f"its epoch is {prepared.epoch}, the running plan has {after}")
    if not (math.isfinite(prepared.gain_s) and _plausible_s(prepared.move_s)):
        raise _refused("it predicts a gain, or a time to move weights, that is none")
    return accepted(terms, prepared.plan, prepared.names, me)


def check_job_id(job: JobId) -> None:
    """Raise JobError unless what the broker calls a job may go into messages, files and a terminal."""
    try:
        check_name(job)
    except ConfigError as error:
        raise JobError(
            f"the broker calls the job by something that is no name: {error}; use one that you trust"
        ) from error


def check_share(terms: PlanTerms, plan: Plan, share: Assignment | None, me: PeerId, running: Set[str]) -> None:
    """Check that what this machine was given to do for an accepted plan is its own part of that plan.

    Args:
        terms: what the owner asked for.
        plan: an accepted plan.
        share: what the broker assigned to this machine for it; None: nothing.
        me: the owner's machine.
        running: peers of the plan that runs until then; none for a job's first plan.

    Raises:
        JobError: the share is another one; the text names the stage and the peer.
    """
    mine = f"the share of the owner's own machine ({me[:12]})"
    subdags = cut(terms.graph, plan.cuts)
    own = [subdag for subdag, stage in zip(subdags, plan.stages, strict=True) if stage.peer == me]
    if share is None:
        if own:
            raise _refused(f"{mine} lacks stage {own[0].index}, which the plan gives it")
        return
    given = {subdag.index: subdag for subdag in share.share.subdags}
    if len(given) != len(share.share.subdags) or given.keys() != {subdag.index for subdag in own}:
        raise _refused(f"{mine} has the stages {sorted(given)}, the plan gives it {[each.index for each in own]}")
    for subdag in own:
        # Encoded, since in Python 1 equals True and 1.0, which mean different things to an operator.
        if encode_subdag(given[subdag.index]) != encode_subdag(subdag):
            raise _refused(f"stage {subdag.index} in {mine} is not what the owner's model has there")
    if share.share.options != terms.options:
        raise _refused(f"{mine} has other options than the job")
    if share.share.in_flight != {stage.stage: stage.in_flight for stage in plan.stages_of(me)}:
        raise _refused(f"{mine} has other numbers of microbatches in flight than the plan")
    _check_roster(plan, share, subdags, me, running)


def _check_roster(plan: Plan, share: Assignment, subdags: Sequence[SubDag], me: PeerId, running: Set[str]) -> None:
    """Check whom this machine is to obey, to send to and to link with."""
    roster, mine = share.roster, f"the roster of the owner's own machine ({me[:12]})"
    for role, peer in (("driver", roster.driver), ("owner", roster.owner)):
        if peer != me:
            raise _refused(f"{mine} names {printable(peer)[:12]} as the {role} of its job")
    holders = tuple(stage.peer for stage in plan.stages)
    found = roster.pipelines[0] if len(roster.pipelines) == 1 else ()
    for stage, (here, there) in enumerate(zip(found, holders, strict=False)):
        if here != there:
            raise _refused(f"{mine} gives stage {stage} to {printable(here)[:12]}, the plan to {there[:12]}")
    if found != holders:
        raise _refused(f"{mine} has {len(roster.pipelines)} pipelines of other stages than the plan's {len(holders)}")
    keys = share.share.weights().keys()
    if roster.sums != {key: peers for key, peers in tied_holders(subdags, holders).items() if key in keys}:
        raise _refused(f"{mine} exchanges gradients of other weights, or with others, than the plan says")
    neighbours = [each.peer for each in roster.neighbours]
    for peer in (*neighbours, *(each.peer for each in roster.handing)):
        if peer == me or peer not in {*holders, *running}:
            raise _refused(f"{mine} names {printable(peer)[:12]} as a neighbour, which has no stage of the plan")
    if sorted(neighbours) != sorted({*holders} - {me}):
        raise _refused(f"{mine} names {len(neighbours)} neighbours, the plan {len({*holders} - {me})}")


# --- parts of a plan --------------------------------------------------------------------------------------------------


class _Names:
    """What errors call machines."""

    def __init__(self, names: Mapping[str, str], me: PeerId) -> None:
        self.names, self.me = names, me

    def __call__(self, peer: str) -> str:
        return f"{self.names[peer]} ({peer[:12]})" if peer in self.names else peer[:12]


def _check_names(names: Mapping[str, str]) -> None:
    for peer, name in names.items():
        _check_key(peer, "a name")
        try:
            check_name(name)
        except ConfigError as error:
            raise _refused(f"{peer[:12]} has a name that is none: {error}") from error
    if len(set(names.values())) < len(names):
        raise _refused("two of its machines have one name")


def _check_key(peer: str, what: str) -> None:
    try:
        public_key_bytes(peer)
    except ProtocolError as error:
        raise _refused(f"{what} belongs to {printable(peer)[:12]!r}, which is no key of a machine") from error


def _check_as_submitted(terms: PlanTerms, plan: Plan, me: PeerId) -> None:
    if plan.graph_hash != terms.graph_hash:
        raise _refused("it is for another model")
    for what, found, wanted in (
        ("sizes", plan.sizes, terms.sizes),
        ("microbatches", plan.microbatches, terms.microbatches),
        ("privacy", plan.privacy, terms.privacy),
    ):
        if found != wanted:
            raise _refused(f"its {what} are {found}, submitted were {wanted}"[:500])
    if plan.owner != me and (plan.owner or terms.privacy == "private"):
        raise _refused(f"it names {printable(plan.owner)[:12]!r} as the owner, which is {me[:12]}")
    try:
        pipeline = plan.only_pipeline()
    except PlacementError as error:
        raise _refused(str(error)) from error
    if pipeline.microbatches != terms.microbatches:
        raise _refused(f"its pipeline takes {pipeline.microbatches} of {terms.microbatches} microbatches")


def _stages(terms: PlanTerms, plan: Plan) -> tuple[StagePlan, ...]:
    """Return the stages of a plan, which cover every operator once and in order, each on a machine with a key."""
    stages, operators = plan.stages, len(terms.graph.nodes)
    if not stages:
        raise _refused("it has no stage")
    for place, stage in enumerate(stages):
        _check_key(stage.peer, f"stage {place}")
        if stage.stage != place or not 1 <= stage.in_flight <= terms.microbatches:
            raise _refused(f"stage {place} is numbered {stage.stage} and holds {stage.in_flight} microbatches")
    bounds = [(stage.start, stage.stop) for stage in stages]
    apart = any(stop != start for (_, stop), (start, _) in pairwise(bounds))
    if apart or bounds[0][0] != 0 or bounds[-1][1] != operators or any(start >= stop for start, stop in bounds):
        raise _refused(f"its stages do not cover the model's {operators} operators once and in order")
    return stages


def _check_holders(terms: PlanTerms, stages: Sequence[StagePlan], who: _Names) -> None:
    """Check that the plan uses the machines, and the cuts, that the owner allows."""
    for stage in stages:
        pinned = stage.start < terms.front or stage.stop > terms.back
        if terms.privacy == "private" and pinned and stage.peer != who.me:
            raise _refused(
                f"stage {stage.stage} (operators {stage.start} to {stage.stop}) would run on {who(stage.peer)}, but a "
                f"private job keeps operators before {terms.front} and from {terms.back} on on the owner's machine"
            )
    others = list(dict.fromkeys(stage.peer for stage in stages if stage.peer != who.me))
    if terms.compnodes and len(others) != terms.compnodes:
        raise _refused(f"it uses {len(others)} compnodes, placement.compnodes asks for {terms.compnodes}")
    for stage in stages:
        if terms.machines and stage.peer != who.me and who.names.get(stage.peer) not in terms.machines:
            raise _refused(
                f"stage {stage.stage} would run on {who(stage.peer)}, which is none of placement.machines "
                f"({', '.join(terms.machines)})"
            )
    if terms.cuts is None:
        return
    operators = len(terms.graph.nodes)
    wanted = [position for position in (terms.front, *terms.cuts, terms.back) if 0 < position < operators]
    if [stage.start for stage in stages[1:]] != wanted:
        raise _refused(f"it cuts at {[stage.start for stage in stages[1:]]}, placement.cuts asks for {wanted}")
    if terms.machines and [who.names[peer] for peer in others] != list(terms.machines):
        raise _refused("its compnodes are not in the order of placement.machines")


def _check_figures(plan: Plan, stages: Sequence[StagePlan]) -> None:
    """Check what the owner will compute with."""
    seconds = [plan.end_of_step_s, plan.predicted_step_s, plan.bound_step_s or 0.0, plan.only_pipeline().predicted_s]
    for stage in stages:
        each = stage.predicted
        seconds += [each.forward_s, each.backward_s, each.update_s, each.send_s]
        if not 0 <= each.memory_bytes < _MOST_BYTES:
            raise _refused(f"stage {stage.stage} would need {each.memory_bytes} bytes")
    if not all(map(_plausible_s, seconds)):
        raise _refused("it predicts times that are none")


def _plausible_s(seconds: float) -> bool:
    """Return whether a predicted time can be computed with."""
    return math.isfinite(seconds) and 0 <= seconds <= _MOST_S


def _check_private(terms: PlanTerms, stages: Sequence[StagePlan], subdags: Sequence[SubDag], who: _Names) -> None:
    """Check that nothing which shows raw data is fed, or sent on, to another machine.

    By the way in which the graph was arranged this follows from who holds which stage. It is checked all the same,
    because everything that a private job promises rests on it.
    """
    raw = {train: raw_values(terms.graph, train=train) for train in (True, False)}
    for stage, subdag in zip(stages, subdags, strict=True):
        for train, shown in raw.items():
            part = face(subdag, train)
            values = [*(item.name for item in part.inputs), *(transfer.value for transfer in part.receives)]
            found = next((value for value in values if value in shown), None)
            if found is not None and stage.peer != who.me:
                raise _refused(f"stage {stage.stage} on {who(stage.peer)} would get {found!r}, which shows raw data")


def _refused(problem: str) -> JobError:
    return JobError(
        f"the broker's plan is refused, and nothing was sent by it: {problem}. The broker is faulty or hostile: use "
        "one that you trust"
    )
