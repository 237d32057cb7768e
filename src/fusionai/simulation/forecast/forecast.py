"""Everything that an owner learns of a pool before joining it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Literal

import msgspec

from fusionai.errors import PlacementError
from fusionai.scheduling.bound import least_step_s
from fusionai.scheduling.explain import holding
from fusionai.scheduling.plan import Plan, StagePlan
from fusionai.scheduling.profile import Member
from fusionai.simulation.forecast.alone import Alone, each_alone
from fusionai.simulation.forecast.changes import (
    best_machine,
    link_doubled,
    links_and_lines_busy_s,
    one_more,
    uplinks_doubled,
)
from fusionai.simulation.forecast.elsewhere import saying_elsewhere
from fusionai.simulation.forecast.rented import Rented, each_rented
from fusionai.simulation.forecast.request import (
    Request,
    Setting,
    best_on,
    offered,
    plan_on,
    searched,
    setting_of,
    with_owner,
)
from fusionai.simulation.hardware.efficiency import ASSUMED
from fusionai.simulation.hardware.what_if_pool import WhatIfPool

USD_PER_KWH = 0.15
"""Price of electricity; assumed."""

ChangeName = Literal["one_more_machine", "bottleneck_link_doubled", "uplinks_doubled"]


class StageRow(msgspec.Struct, frozen=True, kw_only=True):
    """A stage of the plan, with the names of the pool file."""

    stage: int
    machine: str
    device: str
    holds: str
    memory_bytes: int
    offered_bytes: int
    """By the machine; several stages of one share it."""
    seconds: float
    """Seconds of a microbatch, forward and backward."""
    busy: float
    """Share of a step for which the machine computes, in all of its stages: passes, and the update once."""


class PipelineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One of several pipelines."""

    stages: tuple[StageRow, ...]
    microbatches: int
    """Microbatches of each step that it takes."""
    predicted_s: float
    """From the first forward to the last backward of its microbatches."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a better pool would give."""

    what: str
    """What is changed, in words."""
    predicted_step_s: float
    tokens_per_s: float
    speedup: float
    """Over the plan for the pool as it is; at least 1, since that plan stands on the better pool as well."""


class Assumed(msgspec.Struct, frozen=True, kw_only=True):
    """Figures that a forecast rests on and nobody measured."""

    figure: str
    note: str
    machines: tuple[str, ...]


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `fusionai plan --json`."""

    plan: Plan
    stages: tuple[StageRow, ...]
    predicted_step_s: float
    tokens_per_s: float
    job_steps: int
    job_s: float
    """What all steps of the job would take if nobody left."""
    bottleneck: str
    busiest_share: float
    """Share of a step for which that is busy. Well below 1, machines mostly wait for each other."""
    bound_step_s: float
    """No plan on these machines is faster: their computing, divided without loss over all of them, and free links."""
    bound_share: float
    """Share of the bound's speed that the plan reaches."""
    planning_s: float
    """Seconds that the plan took to make, those of the what-ifs not counted."""
    offered: int
    """Machines of the pool, the owner's not counted."""
    considered: int
    """How many of them the plan was sought among: all, or of a large pool those of the best single chains."""
    pipelines: tuple[PipelineRow, ...]
    """The best plan of any number of pipelines, which the runtime does not run yet if they are several. Empty where
    the job says how many machines serve, or where it is cut."""
    pipelines_step_s: float | None
    pipelines_tokens_per_s: float | None
    pipelines_bottleneck: str
    pipelines_planning_s: float
    alone: tuple[Alone, ...]
    rented: tuple[Rented, ...]
    """Single cards of clouds with the same job, the cheapest by token first."""
    board_w: float | None
    """Power of the boards of the plan's machines at full load; None where nobody publishes it for all of them."""
    electricity_usd_per_million_tokens: float | None
    """Price of the electricity of those boards at `USD_PER_KWH`, if they work all the time: at most so much."""
    what_if: dict[ChangeName, Change]
    """Without a change that cannot be made: no link is doubled where nothing is sent."""
    assumed: tuple[Assumed, ...]
    lab: bool = False


def forecast(
    request: Request,
    what_if: WhatIfPool,
    *,
    job_steps: int = 1,
    what_ifs: bool = True,
    clock_s: Callable[[], float] = time.perf_counter,
) -> Forecast:
    """Return what a pool would give a job. Blocks for seconds, with large models and pools for half a minute.

    Args:
        request: the job.
        what_if: the pool.
        job_steps: of the whole job.
        what_ifs: whether single and rented machines and better pools are planned for, too, each anew as a broker would.
        clock_s: times the planning.

    Raises:
        ConfigError: the job is private and the pool has no owner, or the job's cuts are wrong.
        PlacementError: the job names a machine that the pool has not, or no plan meets the constraints: the text says
            what is missing, and with `what_ifs` what else
            could train the job.
    """
    what_if = offered(request, what_if)
    full = with_owner(what_if, request.problem.privacy)
    started_s = clock_s()
    try:
        part = searched(request, full)
        setting = setting_of(part)
        plan = plan_on(request, setting)
    except PlacementError as error:
        if not what_ifs:
            raise
        raise saying_elsewhere(error, request, what_if) from error
    planned_s = clock_s()
    best = None if request.arranged else best_on(request, full)
    several_s = clock_s() - planned_s
    # One pipeline is a number of pipelines, too.
    several = best if best is None or best.predicted_step_s < plan.predicted_step_s else plan
    bound_step_s = _bound_s(request, full)
    (rows,) = rows_of(request, plan, setting.machines)
    board_w = _board_w({stage.peer for stage in plan.stages}, full)
    tokens_per_s = request.tokens_per_step / plan.predicted_step_s
    longest_link_s = max(
        (seconds for busy in links_and_lines_busy_s(request, plan, setting) for seconds in busy.values()), default=0.0
    )
    return Forecast(
        plan=plan,
        stages=rows,
        busiest_share=max(longest_link_s / plan.predicted_step_s, *(each.busy for each in rows)),
        predicted_step_s=plan.predicted_step_s,
        tokens_per_s=tokens_per_s,
        job_steps=job_steps,
        job_s=job_steps * plan.predicted_step_s,
        bottleneck=plan.bottleneck,
        bound_step_s=bound_step_s,
        bound_share=bound_step_s / plan.predicted_step_s,
        planning_s=planned_s - started_s,
        offered=len(full.members),
        considered=len(part.members),
        pipelines=_pipelines(request, several, full) if several else (),
        pipelines_step_s=several.predicted_step_s if several else None,
        pipelines_tokens_per_s=request.tokens_per_step / several.predicted_step_s if several else None,
        pipelines_bottleneck=several.bottleneck if several else "",
        pipelines_planning_s=several_s,
        alone=each_alone(request, what_if, full, plan.predicted_step_s) if what_ifs else (),
        rented=each_rented(request, plan.predicted_step_s) if what_ifs else (),
        board_w=board_w,
        electricity_usd_per_million_tokens=(
            None if board_w is None else board_w / 1000 * USD_PER_KWH * (1e6 / tokens_per_s) / 3600
        ),
        what_if=_changes(request, part, setting, plan) if what_ifs else {},
        assumed=assumptions(what_if),
    )


def _board_w(peers: Collection[str], what_if: WhatIfPool) -> float | None:
    """Return what the boards of some machines draw together; None where a machine has no published figure."""
    found = 0.0
    for machine, hardware in zip(what_if.machines, what_if.hardware, strict=False):
        if machine.peer in peers:
            if hardware is None or hardware.power_w is None:
                return None
            found += hardware.power_w
    return found


def _bound_s(request: Request, what_if: WhatIfPool) -> float:
    computing = what_if.machines if request.problem.privacy == "private" else what_if.members
    return least_step_s(
        request.part_costs,
        [each.device for each in computing],
        microbatches=request.problem.microbatches,
        precision=request.problem.precision,
        optimizer_states=request.problem.optimizer_states,
    )


def rows_of(request: Request, plan: Plan, machines: Sequence[Member]) -> tuple[tuple[StageRow, ...], ...]:
    """Return the stages of each pipeline of a plan, with the names of machines."""
    by_peer = {each.peer: each for each in machines}
    busy_s: defaultdict[str, float] = defaultdict(float)
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            passes_s = pipeline.microbatches * (stage.predicted.forward_s + stage.predicted.backward_s)
            busy_s[stage.peer] += passes_s + stage.predicted.update_s

    @cache
    def held(start: int, stop: int) -> str:
        return holding(request.problem.graph.nodes[start:stop])

    busy = {peer: seconds / plan.predicted_step_s for peer, seconds in busy_s.items()}
    return tuple(_stage_rows(pipeline.stages, by_peer, busy, held) for pipeline in plan.pipelines)


def _stage_rows(
    stages: Sequence[StagePlan],
    machines: Mapping[str, Member],
    busy: Mapping[str, float],
    held: Callable[[int, int], str],
) -> tuple[StageRow, ...]:
    return tuple(
        StageRow(
            stage=stage.stage,
            machine=machines[stage.peer].name,
            device=machines[stage.peer].device.name,
            holds=held(stage.start, stage.stop),
            memory_bytes=stage.predicted.memory_bytes,
            offered_bytes=machines[stage.peer].device.memory_bytes,
            seconds=stage.predicted.forward_s + stage.predicted.backward_s,
            busy=busy[stage.peer],
        )
        for stage in stages
    )


def _pipelines(request: Request, plan: Plan, what_if: WhatIfPool) -> tuple[PipelineRow, ...]:
    return tuple(
        PipelineRow(stages=rows, microbatches=each.microbatches, predicted_s=each.predicted_s)
        for each, rows in zip(plan.pipelines, rows_of(request, plan, what_if.machines), strict=True)
    )


def _changes(request: Request, what_if: WhatIfPool, setting: Setting, plan: Plan) -> dict[ChangeName, Change]:
    found: dict[ChangeName, Change] = {}

    def add(name: ChangeName, what: str, changed: Setting, asked: Request = request) -> None:
        try:
            step_s = plan_on(asked, changed).predicted_step_s
        except PlacementError:
            # The planner's search has an end, and the better pool led it elsewhere; the old plan still stands.
            step_s = plan.predicted_step_s
        step_s = min(step_s, plan.predicted_step_s)
        found[name] = Change(
            what=what,
            predicted_step_s=step_s,
            tokens_per_s=request.tokens_per_step / step_s,
            speedup=plan.predicted_step_s / step_s,
        )

    best = best_machine(request, what_if)
    # A job that says how many machines to use would leave the new one out.
    larger = (
        request.using(request.problem.limits.compnodes + 1)
        if request.problem.limits.compnodes and request.problem.limits.cuts is None
        else request
    )
    like = what_if.members[best]
    more = setting_of(one_more(what_if, best))
    add("one_more_machine", f"one more machine like {like.name} ({like.device.name})", more, larger)
    links_s, _ = links_and_lines_busy_s(request, plan, setting)
    if links_s:
        link = max(links_s, key=lambda link: links_s[link])
        one, other = (next(each.name for each in setting.machines if each.peer == peer) for peer in link)
        what = f"twice the bandwidth between {one} and {other}, both ways"
        add("bottleneck_link_doubled", what, link_doubled(setting, *link))
    add(
        "uplinks_doubled",
        "twice the bandwidth of every uplink, downlinks as they are",
        setting_of(uplinks_doubled(what_if)),
    )
    return found


def assumptions(what_if: WhatIfPool) -> tuple[Assumed, ...]:
    """Return which figures of a pool are assumed, machines with the same assumption together."""
    by_note: dict[str, list[str]] = {}
    given: list[str] = []
    for machine, hardware in zip(what_if.machines, what_if.hardware, strict=True):
        names = given if hardware is None else by_note.setdefault(ASSUMED[hardware.kind].note, [])
        names.append(machine.name)
    found = [
        Assumed(figure="share of a device's published peak", note=note, machines=tuple(names))
        for note, names in by_note.items()
    ]
    if given:
        note = "the pool file gives what work reaches; attention and convolution are assumed to reach half of that"
        found.append(Assumed(figure="rates of attention and convolution", note=note, machines=tuple(given)))
    if what_if.owner is None:
        note = (
            "the pool file has none: to drive the job is taken to cost no time, whatever lies between it and the pool"
        )
        found.append(Assumed(figure="the owner's machine", note=note, machines=()))
    links = (
        "the pool file's, what a machine sends sharing its uplink and what it gets its downlink; nobody measured them"
    )
    found.append(Assumed(figure="links", note=links, machines=tuple(each.name for each in what_if.machines)))
    return tuple(found)
