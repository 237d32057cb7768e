"""The planner of swarms: how many pipelines, on which machines, with which cuts and shares of a step.

OP-Fence (FusionLLM, arXiv 2410.12707) clusters machines by bandwidth, orders them so that slow links are crossed least,
and cuts at small tensors. Here that fence is also where pipelines are parted: the machines along it are grouped in many
ways, from one pipeline of each machine to one of all. Groupings are compared quickly; the chains of the best few are
solved and worked through as schedules, the sum of gradients over pipelines at the end of a step included.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from fusionai.errors import PlacementError
from fusionai.graph.model import OpDag, Sizes
from fusionai.scheduling.links import Indices, LinkModel
from fusionai.scheduling.profile import Member
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.shortage import JOINED, Remedies, no_link_with_owner, nothing_fits, owner_too_small
from fusionai.scheduling.swarm.candidates import ChainSolver, estimated, refined
from fusionai.scheduling.swarm.chain import proportional
from fusionai.scheduling.swarm.costing import make_work
from fusionai.scheduling.swarm.end_of_step import end_s
from fusionai.scheduling.swarm.exact import best_small_chains
from fusionai.scheduling.swarm.grouping import Grouping, fenced, groupings, scopes
from fusionai.scheduling.swarm.outcome import Outcome, outcome, owner_need_bytes, swarm_plan
from fusionai.scheduling.swarm.running import Running, run
from fusionai.scheduling.swarm.selection import NO_GUESS, Selection, selected, weighed
from fusionai.scheduling.swarm.shares import shared_out
from fusionai.scheduling.swarm.task import SwarmTask
from fusionai.scheduling.swarm.work import Work
from fusionai.scheduling.swarm_plan import SwarmPlan

_Groups: TypeAlias = tuple[tuple[int, ...], ...]
"""A grouping's machines, group by group."""

_REFINED = 14
"""Groupings whose chains are solved."""

_OF_SITES = 5
"""Those of groupings by sites that are solved in any case."""

_MANY_CHAINS = 16
_HOPELESS_OF_MANY = 1.3
_HOPELESS = 2.5
"""Groupings of more chains than that, and of fewer, are not solved if the guess is so many times the best so far."""

_WORTH_POLISHING = 1.5
"""Chains are polished if they take at most so many times the best so far."""

_MOST_SITES = 64
"""Clusters of near machines up to which they are grouped one by one."""

_LOOKED_AT = 12
"""Selections of which the end of the step is reckoned as it would be."""

_WORKED_THROUGH = 6
"""Those of them whose schedules are worked through, at most."""

_ALONE = 8
"""Machines that are weighed as doing everything by themselves: updates tell them apart only where they are close."""

_SURE = 0.98
"""A schedule is hardly ever so much faster than ideal pipelines and the end of their step."""

_BUDGET_SHARES = (0.9, 0.75)
"""Of each machine's memory, tried where real stages turned out larger than sums over segments."""

_OWNER_LIMITS = (4, 2, 1)


def plan_swarm(
    graph: OpDag,
    *,
    graph_hash: str,
    sizes: Sizes,
    microbatches: int,
    optimizer_states: int,
    precision: Literal["fp32", "bf16"],
    members: Sequence[Member],
    owner: Member | None,
    links: LinkModel,
    privacy: Literal["private", "open"],
    front: int,
    back: int,
    remedies: Remedies = JOINED,
) -> SwarmPlan:
    """Return the fastest plan found. Blocks for up to a minute with ten thousand machines: call it in a thread.

    Nodes [0, front) and [back, N) run on the owner's machine in every pipeline; the graph must be arranged for that.
    `microbatches` are those of a step over all pipelines. `links` numbers the members, then the owner.
    `remedies`: what errors advise.

    Raises PlacementError with what is missing when no plan meets memory, reachability and pins.
    """
    return plan(
        SwarmTask(
            graph=graph,
            graph_hash=graph_hash,
            sizes=sizes,
            microbatches=microbatches,
            optimizer_states=optimizer_states,
            precision=precision,
            members=tuple(members),
            owner=owner,
            links=links,
            privacy=privacy,
            front=front,
            back=back,
            remedies=remedies,
        )
    )


def plan(task: SwarmTask) -> SwarmPlan:
    """Return the fastest plan found for a task; see `plan_swarm`."""
    if not len(task.candidates):
        assert task.owner is not None, "without an owner everybody is a candidate"
        raise no_link_with_owner(task.members, task.owner, task.remedies)
    work = make_work(task)
    solver = ChainSolver(work)
    # Several groupings may come to the same selection.
    candidates = list(dict.fromkeys(_selections(solver)))
    candidates.sort(key=lambda each: each.step_s)
    chosen = _promising(work, candidates)
    found: list[Outcome] = []
    for selection, ideal_s in chosen.items():
        least_s = max(selection.step_s, _SURE * ideal_s)
        if found and least_s >= min(each.step_s for each in found):
            continue
        if (made := worked_through(solver, selection)) is not None:
            found.append(made)
    known_s = min((each.step_s for each in found), default=math.inf)
    small = (worked_through(solver, selection) for selection in best_small_chains(work, known_s))
    found += [each for each in small if each is not None]
    if not found:
        found = [
            each for each in (worked_through(solver, other) for other in candidates if other not in chosen) if each
        ]
    if not found:
        raise _nothing_fits(work)
    return swarm_plan(work, min(found, key=lambda each: each.step_s))


def _promising(work: Work, candidates: Sequence[Selection]) -> dict[Selection, float]:
    """Return the selections that are worth working through, the best first, and what they ideally take.

    That is ideal pipelines and the end of their step with the sums taken in turn, which are soon reckoned.
    """
    ideal_s = {each: each.pipelines_s + end_s(work, each.chains) for each in candidates[:_LOOKED_AT]}
    order = sorted(ideal_s, key=lambda each: ideal_s[each])
    # The first is worked through whatever the others make: now and then a schedule is faster than what is ideal.
    found = {each: ideal_s[each] for each in (*candidates[:1], *order[:_WORKED_THROUGH])}
    # One machine alone and one pipeline are looked at in any case: lines that links share are not in what is ideal.
    for alone in (True, False):
        single = [each for each in candidates if len(each.chains) == 1 and (len(each.chains[0].machines) == 1) == alone]
        found |= {each: each.step_s for each in single[:1] if each not in found}
    return found | {each: each.step_s for each in _alone(work) if each not in found}


def _alone(work: Work) -> list[Selection]:
    """Return the machine that does a step by itself soonest, its report to the owner included; none if none can."""
    task, rounds = work.task, work.task.microbatches
    chains = proportional(work, list(task.candidates[:, None]), 1.0, rounds)
    away_s = np.zeros(len(chains))
    if task.owner_index is not None:
        away_s = 2 * task.delays(np.full(len(chains), task.owner_index), task.candidates)
    ends_s = np.asarray([each.seconds(rounds) for each in chains]) + away_s
    soonest = [weighed(work, [chains[place]]) for place in np.argsort(ends_s, kind="stable")[:_ALONE]]
    found = [each for each in soonest if each is not None]
    return [min(found, key=lambda each: each.step_s)] if found else []


def _selections(solver: ChainSolver) -> list[Selection]:
    """Return selections of solved chains from the most promising groupings."""
    work = solver.work
    fence = fenced(work)
    near = work.near_clusters
    # Which of the sites take part is chosen by the rings of their pipelines.
    sites = [fenced(work, near)] if 1 < len(near) <= _MOST_SITES and len(near) != len(fence) else []
    ways: dict[_Groups, Grouping] = {}

    def gathered(some: Sequence[Sequence[Indices]]) -> None:
        for scope in some:
            for grouping in groupings(work, scope):
                ways.setdefault(tuple(tuple(group.tolist()) for group in grouping.groups), grouping)

    gathered(sites)
    of_sites = set(ways)
    gathered(scopes(work, fence))
    guesses = _guesses(work, ways, of_sites)
    guesses.sort(key=lambda pair: pair[0].step_s)
    # Guesses of unlike ways are not alike in how far they are off: a few of each kind are solved. Groupings in which
    # the same pipelines would run are one kind, but solved they may differ, so the first guesses are all solved.
    unlike: dict[frozenset[tuple[int, ...]], _Groups] = {}
    for guess, key in guesses:
        unlike.setdefault(frozenset(chain.machines for chain in guess.chains), key)
    keys = [key for _, key in guesses]
    single, by_site = ([key for key in keys if len(key) == 1], [key for key in unlike.values() if key in of_sites])
    first = {*keys[:_REFINED], *list(unlike.values())[:_REFINED], *single[:2], *by_site[:_OF_SITES]}
    chosen = [(guess, ways[key]) for guess, key in guesses if key in first]
    rest = [(guess, ways[key]) for guess, key in guesses if key not in first]
    found: list[Selection] = []
    for guess, way in chosen:
        best_s = min((each.step_s for each in found), default=math.inf)
        if guess.step_s > best_s * (_HOPELESS_OF_MANY if len(way.groups) > _MANY_CHAINS else _HOPELESS):
            continue
        made = refined(solver, way, guess)
        solved_s = math.inf if made is None else made.step_s
        found += [] if made is None else [made]
        starts = [made] if made is not None and made.step_s < _WORTH_POLISHING * min(best_s, solved_s) else []
        starts += [guess] if guess.step_s < _WORTH_POLISHING * min(best_s, solved_s) else []
        found += [each for each in (_polished(solver, start) for start in starts) if each is not None]
    if not found:
        # Quick guesses cut by speed, and what is cut for memory may fit all the same: whatever does is welcome.
        guessed = {key for _, key in guesses}
        rest += [(NO_GUESS, way) for key, way in ways.items() if key not in guessed]
        found = [each for each in (refined(solver, way, guess) for guess, way in rest) if each is not None]
    return found


def _guesses(
    work: Work, ways: Mapping[_Groups, Grouping], of_sites: Container[_Groups]
) -> list[tuple[Selection, _Groups]]:
    """Return guesses for all groupings, but for those that would be none of the first that are solved."""
    found: list[tuple[Selection, _Groups]] = []
    # The best step of each set of pipelines, of all groupings and of those by sites.
    by_kind: tuple[dict[frozenset[tuple[int, ...]], float], ...] = ({}, {})
    for key, way in ways.items():
        limits_s = [
            _nth(steps_s.values(), count) for steps_s, count in zip(by_kind, (_REFINED, _OF_SITES), strict=True)
        ]
        below_s = math.inf if len(key) == 1 else max(limits_s) if key in of_sites else limits_s[0]
        if (guess := estimated(work, way, below_s)) is None:
            continue
        found.append((guess, key))
        kind = frozenset(chain.machines for chain in guess.chains)
        for steps_s in by_kind if key in of_sites else by_kind[:1]:
            steps_s[kind] = min(guess.step_s, steps_s.get(kind, math.inf))
    return found


def _nth(values: Iterable[float], place: int) -> float:
    """Return the value at a place from 1 on in rising order; infinite if there are fewer."""
    first = heapq.nsmallest(place, values)
    return first[-1] if len(first) == place else math.inf


def _polished(solver: ChainSolver, selection: Selection) -> Selection | None:
    """Return a selection with its chains polished; None if nothing is gained."""
    pairs = zip(selection.chains, selection.shares, strict=True)
    chains = [solver.polish(chain, share, selection.sum_s_per_byte) for chain, share in pairs]
    if chains == list(selection.chains):
        return None
    return selected(solver.work, chains)


def worked_through(solver: ChainSolver, selection: Selection) -> Outcome | None:
    """Work a selection's schedules through, mend what does not fit, and share out again by what they took."""
    work = solver.work
    limits = (None, *_OWNER_LIMITS) if work.task.pinned else (None,)
    for limit in limits:
        tried = selection
        if limit is not None:
            tried = replace(
                tried, chains=tuple(replace(c, in_flight_limit=min(c.in_flight_limit, limit)) for c in tried.chains)
            )
        if (runs := _mended(solver, tried)) is None:
            continue
        offered = work.task.owner.device.memory_bytes if work.task.owner else 0
        if owner_need_bytes(work, runs) <= offered or not work.task.pinned:
            return _shared_again(work, runs)
    return None


def _mended(solver: ChainSolver, selection: Selection) -> list[Running] | None:
    """Return the schedules; a chain that does not fit is cut anew with less memory, or left out."""
    work = solver.work
    chains, shares = list(selection.chains), list(selection.shares)
    for budget_share in (*_BUDGET_SHARES, None):
        runs = [run(work, chain, share) for chain, share in zip(chains, shares, strict=True)]
        broken = [index for index, each in enumerate(runs) if not each.possible]
        if not broken:
            return runs
        for index in broken:
            chain, machines = chains[index], np.asarray(chains[index].machines)
            mended = None
            if budget_share is not None and len(machines) > 1:
                mended = solver.solve(machines, shares[index], float(len(chains)), 1e-2, budget_share)
            elif budget_share is not None and chain.in_flight_limit > 1:
                mended = replace(chain, in_flight_limit=1)
            if mended is not None:
                chains[index] = mended
        if budget_share is None:
            kept = [chain for index, chain in enumerate(chains) if index not in broken]
            again = selected(work, kept)
            if again is None:
                return None
            runs = [run(work, chain, share) for chain, share in zip(again.chains, again.shares, strict=True)]
            return runs if all(each.possible for each in runs) else None
    return None


def _shared_again(work: Work, runs: list[Running]) -> Outcome:
    """Return the outcome, microbatches shared out once more by what the schedules really took if that is faster."""
    before = outcome(work, runs)
    if len(runs) == 1:
        return before
    period = np.asarray([each.chain.period_s for each in runs])
    latency = np.asarray([each.times.makespan_s - (each.microbatches - 1) * each.chain.period_s for each in runs])
    shares = shared_out(np.maximum(latency, 0.0), period, work.task.microbatches)
    if (shares == 0).any():
        return before
    again = [
        each if each.microbatches == share else run(work, each.chain, int(share))
        for each, share in zip(runs, shares, strict=True)
    ]
    if not all(each.possible for each in again):
        return before
    if work.task.owner and owner_need_bytes(work, again) > max(
        work.task.owner.device.memory_bytes, owner_need_bytes(work, runs)
    ):
        return before
    after = outcome(work, again)
    return after if after.step_s < before.step_s else before


def _nothing_fits(work: Work) -> PlacementError:
    """Return why no plan is possible: somebody holds too little, or links are missing."""
    task = work.task
    if task.owner and task.pinned:
        need = sum(cost.training_bytes(1, task.optimizer_states) for cost in work.segments.outer) * MEMORY_MARGIN
        if need > task.owner.device.memory_bytes:
            return owner_too_small(task.owner, need)
    return nothing_fits(
        work.segments,
        [task.machines[machine] for machine in task.candidates],
        fewest=1,
        most=len(task.candidates),
        optimizer_states=task.optimizer_states,
        remedies=task.remedies,
    )
