"""The search for plans of any number of pipelines: on which machines, with which cuts and shares of a step.

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
from typing import TypeAlias

import numpy as np

from fusionai.errors import PlacementError
from fusionai.scheduling.evaluation import Evaluated
from fusionai.scheduling.links import Indices
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.chain import Chain, proportional
from fusionai.scheduling.search.chain_solver import ChainSolver, estimated, refined
from fusionai.scheduling.search.end_estimate import end_s
from fusionai.scheduling.search.grouping import Grouping, fenced, groupings, scopes
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.selection import UNESTIMATED, Selection, selected, weighed
from fusionai.scheduling.search.shares import shared_out
from fusionai.scheduling.search.small_pools import best_small_chains
from fusionai.scheduling.search.step_bound import least_s
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.shortage import nothing_fits, owner_too_small
from fusionai.scheduling.worked_pipeline import WorkedPipeline

_Groups: TypeAlias = tuple[tuple[int, ...], ...]
"""A grouping's machines, group by group."""

_REFINED = 14
"""Groupings whose chains are solved."""

_OF_SITES = 5
"""Groupings by site: the planner always solves the best few of them exactly."""

_MANY_CHAINS = 16
_HOPELESS_OF_MANY = 1.3
_HOPELESS = 2.5
"""A grouping is not solved if its estimate is so many times the best step so far. The first factor is for groupings of
more than `_MANY_CHAINS` chains, the second for others."""

_WORTH_POLISHING = 1.5
"""Chains are polished if they take at most so many times the best so far."""

_MOST_SITES = 64
"""Clusters of near machines up to which they are grouped one by one."""

_LOOKED_AT = 12
"""Selections whose end of the step is worked out exactly."""

_WORKED_THROUGH = 6
"""At most so many of these selections have their schedules executed."""

_ALONE = 8
"""Machines that are weighed as doing everything by themselves: updates tell them apart only where they are close."""

_SURE = 0.98
"""A schedule is hardly ever so much faster than ideal pipelines and the end of their step."""

_BUDGET_SHARES = (0.9, 0.75)
"""Shares of each machine's memory that are tried where real stages turned out larger than sums over segments."""

_OWNER_LIMITS = (4, 2, 1)


def best_pipelines(problem: TrainingProblem) -> tuple[Evaluated, float]:
    """Return the fastest pipelines found, of any number, and a bound on the step of all plans.

    Raises PlacementError with what is missing when no plan meets memory, reachability and pins.
    """
    costs = costs_in_segments(problem)
    solver = ChainSolver(costs)
    # Several groupings may come to the same selection.
    candidates = list(dict.fromkeys(_selections(solver)))
    candidates.sort(key=lambda each: each.step_s)
    chosen = _promising(costs, candidates)
    found: list[Evaluated] = []
    for selection, ideal_s in chosen.items():
        likely_s = max(selection.step_s, _SURE * ideal_s)
        if found and likely_s >= min(each.step_s for each in found):
            continue
        if (made := evaluated_selection(solver, selection)) is not None:
            found.append(made)
    known_s = min((each.step_s for each in found), default=math.inf)
    small = (
        evaluated_selection(solver, Selection((chain,), (problem.microbatches,), math.inf))
        for chain in best_small_chains(costs, known_s)
    )
    found += [each for each in small if each is not None]
    if not found:
        others = (evaluated_selection(solver, other) for other in candidates if other not in chosen)
        found = [each for each in others if each is not None]
    if not found:
        raise _nothing_fits(costs)
    return min(found, key=lambda each: each.step_s), least_s(costs)


def _promising(costs: SegmentCosts, candidates: Sequence[Selection]) -> dict[Selection, float]:
    """Return the selections that are worth working through, the best first, and what they ideally take.

    That is ideal pipelines and the end of their step with the sums taken in turn, which are soon reckoned.
    """
    ideal_s = {each: each.pipelines_s + end_s(costs, each.chains) for each in candidates[:_LOOKED_AT]}
    order = sorted(ideal_s, key=lambda each: ideal_s[each])
    # The first is worked through whatever the others make: now and then a schedule is faster than what is ideal.
    found = {each: ideal_s[each] for each in (*candidates[:1], *order[:_WORKED_THROUGH])}
    # One machine alone and one pipeline are looked at in any case: lines that links share are not in what is ideal.
    for alone in (True, False):
        single = [each for each in candidates if len(each.chains) == 1 and (len(each.chains[0].machines) == 1) == alone]
        found |= {each: each.step_s for each in single[:1] if each not in found}
    return found | {each: each.step_s for each in _alone(costs) if each not in found}


def _alone(costs: SegmentCosts) -> list[Selection]:
    """Return the machine that does a step by itself soonest, its report to the owner included; none if none can."""
    problem, rounds = costs.problem, costs.problem.microbatches
    chains = proportional(costs, list(problem.candidates[:, None]), 1.0, rounds)
    away_s = np.zeros(len(chains))
    if problem.owner_index is not None:
        away_s = 2 * problem.delays(np.full(len(chains), problem.owner_index), problem.candidates)
    ends_s = np.asarray([each.seconds(rounds) for each in chains]) + away_s
    soonest = [weighed(costs, [chains[place]]) for place in np.argsort(ends_s, kind="stable")[:_ALONE]]
    found = [each for each in soonest if each is not None]
    return [min(found, key=lambda each: each.step_s)] if found else []


def _selections(solver: ChainSolver) -> list[Selection]:
    """Return selections of solved chains from the most promising groupings."""
    costs = solver.costs
    fence = fenced(costs)
    near = costs.near_clusters
    # Which of the sites take part is chosen by the rings of their pipelines.
    sites = [fenced(costs, near)] if 1 < len(near) <= _MOST_SITES and len(near) != len(fence) else []
    ways: dict[_Groups, Grouping] = {}

    def gathered(some: Sequence[Sequence[Indices]]) -> None:
        for scope in some:
            for grouping in groupings(costs, scope):
                ways.setdefault(tuple(tuple(group.tolist()) for group in grouping.groups), grouping)

    gathered(sites)
    of_sites = set(ways)
    gathered(scopes(costs, fence))
    guesses = _guesses(costs, ways, of_sites)
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
        rest += [(UNESTIMATED, way) for key, way in ways.items() if key not in guessed]
        found = [each for each in (refined(solver, way, guess) for guess, way in rest) if each is not None]
    return found


def _guesses(
    costs: SegmentCosts, ways: Mapping[_Groups, Grouping], of_sites: Container[_Groups]
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
        if (guess := estimated(costs, way, below_s)) is None:
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
    return selected(solver.costs, chains)


def evaluated_selection(solver: ChainSolver, selection: Selection) -> Evaluated | None:
    """Work a selection's schedules through, mend what does not fit, and share out again by what they took."""
    costs, problem = solver.costs, solver.costs.problem
    limits = (None, *_OWNER_LIMITS) if problem.pinned else (None,)
    for limit in limits:
        chains = selection.chains
        if limit is not None:
            chains = tuple(replace(each, in_flight_limit=min(each.in_flight_limit, limit)) for each in chains)
        if (runs := _mended(solver, chains, selection.shares)) is None:
            continue
        found = evaluated_chains(costs, [run for _, run in runs])
        if not found.overloaded:
            return _shared_again(costs, [chain for chain, _ in runs], found)
    return None


def _mended(
    solver: ChainSolver, chains: Sequence[Chain], shares: Sequence[int]
) -> list[tuple[Chain, WorkedPipeline]] | None:
    """Return the chains and their schedules; one that does not fit is cut anew with less memory, or left out."""
    costs = solver.costs
    chains, shares = list(chains), list(shares)
    for budget_share in (*_BUDGET_SHARES, None):
        runs = [worked_chain(costs, chain, share) for chain, share in zip(chains, shares, strict=True)]
        broken = [index for index, each in enumerate(runs) if not each.possible]
        if not broken:
            return list(zip(chains, runs, strict=True))
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
            again = selected(costs, kept)
            if again is None:
                return None
            runs = [worked_chain(costs, chain, share) for chain, share in zip(again.chains, again.shares, strict=True)]
            return list(zip(again.chains, runs, strict=True)) if all(each.possible for each in runs) else None
    return None


def _shared_again(costs: SegmentCosts, chains: Sequence[Chain], before: Evaluated) -> Evaluated:
    """Return the pipelines, microbatches shared out once more by what the schedules really took if that is faster."""
    if len(chains) == 1:
        return before
    period = np.asarray([each.period_s for each in chains])
    latency = np.asarray(
        [
            run.times.makespan_s - (run.choice.microbatches - 1) * chain.period_s
            for chain, run in zip(chains, before.pipelines, strict=True)
        ]
    )
    shares = shared_out(np.maximum(latency, 0.0), period, costs.problem.microbatches)
    if (shares == 0).any():
        return before
    runs = [
        run if run.choice.microbatches == share else worked_chain(costs, chain, int(share))
        for chain, run, share in zip(chains, before.pipelines, shares, strict=True)
    ]
    if not all(each.possible for each in runs):
        return before
    after = evaluated_chains(costs, runs)
    return after if not after.overloaded and after.step_s < before.step_s else before


def _nothing_fits(costs: SegmentCosts) -> PlacementError:
    """Return why no plan is possible: somebody holds too little, or links are missing."""
    problem = costs.problem
    if problem.owner and problem.pinned:
        need = sum(cost.training_bytes(1, problem.optimizer_states) for cost in costs.segments.outer) * MEMORY_MARGIN
        if need > problem.owner.device.memory_bytes:
            return owner_too_small(problem.owner, need)
    return nothing_fits(
        costs.segments,
        [problem.machines[machine] for machine in problem.candidates],
        fewest=1,
        most=len(problem.candidates),
        optimizer_states=problem.optimizer_states,
        remedies=problem.remedies,
    )
