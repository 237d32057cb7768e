"""From a pool to groups of machines, each of which may become a pipeline: candidates for the planner to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fusionai.scheduling.links import Indices
from fusionai.scheduling.search.chain import ordered
from fusionai.scheduling.search.clusters import clustered
from fusionai.scheduling.search.segment_costs import SegmentCosts

_CHAINED = 64
"""Machines up to which an order is searched by their hops; more are sorted by class of link and speed."""

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Machines of a pipeline that are considered."""

_MOST_SCOPES = 12

_SPARE_MEMORY = 1.1
"""What a group's machines must offer over the model's need: no cut gives each exactly what it can hold."""


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """Groups of machines in the order of the fence: neighbours are near. Each is one pipeline at most."""

    groups: tuple[Indices, ...]


def fenced(
    costs: SegmentCosts, clusters: Sequence[Indices] | None = None, *, machines: Indices | None = None
) -> list[Indices]:
    """Return clusters in an order of short hops, and each cluster's machines likewise.

    `clusters`: which; None: those of `machines`, by default of all that may get a stage.
    """
    if clusters is None:
        clusters = clustered(costs.problem, costs.problem.candidates if machines is None else machines)
    firsts = np.asarray([cluster[0] for cluster in clusters])
    place = {int(first): index for index, first in enumerate(firsts)}
    chain = [clusters[place[int(first)]] for first in ordered(costs, firsts)] if len(firsts) <= _CHAINED else clusters
    return [ordered(costs, each) if len(each) <= _CHAINED else _sorted(costs, each) for each in chain]


def _sorted(costs: SegmentCosts, cluster: Indices) -> Indices:
    """Return a large cluster's machines with equal devices next to each other within stretches of like links."""
    speed = np.round(np.log2(costs.whole_s[cluster]) * 8)
    # Members come sorted by class of link; equal speeds make chains without a weak member.
    return cluster[np.argsort(speed, kind="stable")]


def scopes(costs: SegmentCosts, fence: Sequence[Indices]) -> list[list[Indices]]:
    """Return choices of clusters: all, each of the strongest alone, the two strongest, and of many a few together.

    Which clusters' pipelines run together is chosen by their rings (`rings`), here only who may share a pipeline.
    """
    power = [float((1 / costs.whole_s[cluster]).sum()) for cluster in fence]
    strongest = sorted(range(len(fence)), key=lambda index: -power[index])
    found = [tuple(range(len(fence)))]
    found += [(index,) for index in strongest[:_MOST_SCOPES]]
    together = [tuple(sorted(each)) for each in accumulate(((index,) for index in strongest), lambda a, b: a + b)]
    found += together[:2]
    if len(together) > _MOST_SCOPES:
        found += [together[len(together) * share // 4] for share in (1, 2, 3)]
    return [[fence[index] for index in each] for each in dict.fromkeys(found)]


def groupings(costs: SegmentCosts, scope: Sequence[Indices]) -> list[Grouping]:
    """Return the ways to make pipelines of a scope's machines, from one of each machine to one of all.

    Machines follow the fence; a group grows until it has the size and can hold the model. What is left of a cluster
    joins the cluster's last group, or else the next cluster: a fence is crossed only by who would stay alone.
    """
    total = sum(len(cluster) for cluster in scope)
    made: list[Grouping] = []
    for size in _SIZES:
        if size > 1 and size >= min(total, costs.count):
            break
        if groups := _cut_into_groups(costs, scope, size):
            made.append(Grouping(tuple(groups)))
        if size > 1 and (groups := _dealt(costs, scope, size)):
            made.append(Grouping(tuple(groups)))
    everyone = np.concatenate(list(scope))
    most = min(costs.count, _SIZES[-1])
    for count in {min(total, most), *(size for size in _SIZES if 1 < size < min(total, most) and total <= _CHAINED)}:
        fastest = everyone[np.sort(np.argsort(costs.whole_s[everyone], kind="stable")[:count])]
        made.append(Grouping((fastest,)))
    return made


def _cut_into_groups(costs: SegmentCosts, scope: Sequence[Indices], size: int) -> list[Indices]:
    groups: list[Indices] = []
    carried: list[int] = []
    for cluster in scope:
        own: list[list[int]] = []
        current = carried
        for machine in cluster.tolist():
            current.append(machine)
            if len(current) >= size and _holds(costs, current):
                own.append(current)
                current = []
        carried = []
        if current and own and len(own[-1]) + len(current) <= costs.count and size > 1:
            own[-1] += current
        elif current and not own:
            carried = current
        groups += [np.asarray(each, dtype=np.int64) for each in own]
    return groups


def _dealt(costs: SegmentCosts, scope: Sequence[Indices], size: int) -> list[Indices]:
    """Return groups within clusters that are alike: each gets some of the fast machines and some of those with memory.

    Machines are dealt out by memory for their speed, most first: early stages hold the most microbatches.
    """
    groups: list[Indices] = []
    for cluster in scope:
        count = len(cluster) // size
        by_memory = cluster[np.argsort(-costs.budget_bytes[cluster] * costs.whole_s[cluster], kind="stable")]
        dealt = [by_memory[first::count] for first in range(count)]
        groups += [each[: costs.count] for each in dealt if _holds(costs, each.tolist())]
    return groups


def _holds(costs: SegmentCosts, machines: Sequence[int]) -> bool:
    """Whether machines together may hold the model, one microbatch in flight."""
    last = costs.count
    budget = float(costs.budget_bytes[list(machines)].sum())
    held = 1 + float(costs.heap_N[list(machines)].min())
    need = float(costs.segments.fixed_bytes_PP[0, last] + held * costs.segments.flight_bytes_PP[0, last])
    return budget >= need * (_SPARE_MEMORY if len(machines) > 1 else 1.0)
