"""A job as planners see it, and plans for it on any set of machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal

import numpy as np

from fusionai.errors import ConfigError, PlacementError
from fusionai.graph.cost import StageCost
from fusionai.graph.cuts import Cutter, cut_points
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling import planner
from fusionai.scheduling.estimator import flops_rate
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import PlanLimits, TrainingProblem
from fusionai.scheduling.profile import Member, Pool
from fusionai.scheduling.remedies import DESCRIBED
from fusionai.scheduling.search.single_chains import machines_of_single_chains
from fusionai.simulation.hardware.what_if_pool import WhatIfPool

_DRIVER = "the owner's machine"
"""Who drives an open job where the pool file has no owner."""

_MOST_NAMED = 8

MOST_SEARCHED = 64
"""Machines up to which one pipeline is sought among all of them: the search's time grows with their square."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job for which nobody has given machines yet."""

    problem: TrainingProblem
    """Without machines."""
    tokens_per_step: int
    machines: tuple[str, ...] = ()
    """Names of the only ones to use, with cut positions in the order of the parts; all of the pool if empty."""

    @property
    def _cutter(self) -> Cutter:
        return self.problem.costs.cutter(self.problem.graph)

    @cached_property
    def whole_cost(self) -> StageCost:
        """Cost of the whole graph as one stage."""
        return self._cutter.costs(self.problem.sizes).whole

    @cached_property
    def part_costs(self) -> tuple[StageCost, ...]:
        """Costs of the parts that no plan divides: between the job's own cuts, else between all that are possible.

        A weight that several of them read is trained in the first.
        """
        if self.problem.limits.cuts is None:
            within = self.problem.front, self.problem.back
            places = {
                *cut_points(self.problem.graph, self.problem.sizes, within, cutter=self._cutter),
                self.problem.front,
                self.problem.back,
            }
        else:
            places = {*self.problem.limits.cuts, self.problem.front, self.problem.back}
        inner = sorted(place for place in places if 0 < place < len(self.problem.graph.nodes))
        parts, seen, found = self._cutter.cut(inner), set[str](), []
        for part, cost in zip(parts, self._cutter.costs(self.problem.sizes).stages(parts), strict=True):
            weights = {weight.key: weight for weight in part.weights if weight.trainable and weight.key not in seen}
            seen |= weights.keys()
            nbytes = sum(type_bytes(weight.type, {}) for weight in weights.values())
            found.append(dataclasses.replace(cost, trainable_bytes=nbytes))
        return tuple(found)

    @cached_property
    def shared_cost(self) -> StageCost:
        """Cost of all that may be distributed, as one stage."""
        ends = [
            position
            for position in (self.problem.front, self.problem.back)
            if 0 < position < len(self.problem.graph.nodes)
        ]
        shared = self._cutter.cut(ends)[1 if self.problem.front else 0]
        return self._cutter.costs(self.problem.sizes).stages([shared])[0]

    @property
    def arranged(self) -> bool:
        """Whether the job itself says how many machines serve, or where it is cut: then in one pipeline."""
        return self.problem.limits.one_pipeline

    @property
    def in_order(self) -> bool:
        """Whether the job says which machine takes which part."""
        return bool(self.machines) and self.problem.limits.cuts is not None

    def using(self, compnodes: int) -> Request:
        """Return the same request for another number of machines."""
        limits = dataclasses.replace(self.problem.limits, compnodes=compnodes)
        return dataclasses.replace(self, problem=self.problem.within(limits))


@dataclass(frozen=True, slots=True)
class Setting:
    """The machines that may serve, with their links, and the owner's."""

    pool: Pool
    owner: Member

    @property
    def machines(self) -> tuple[Member, ...]:
        """Return the members, then the owner."""
        return (*self.pool.members, self.owner)


def with_owner(what_if: WhatIfPool, privacy: Literal["private", "open"]) -> WhatIfPool:
    """Return the pool with a machine for the owner.

    A pool file without one serves open jobs, whose owner only drives: it feeds tokens and commits steps. A machine
    that costs nothing then stands for the owner's: dialable, no time away from anybody, its links as wide as they get.

    Raises:
        ConfigError: a private job, whose owner's machine computes, and there is none.
    """
    if what_if.owner is not None:
        return what_if
    if privacy == "private":
        raise ConfigError(
            "the pool file has no [owner] table, but of a private job parts of the model stay on the owner's machine; "
            'add the table, or use placement.privacy = "open" if the machines may see the data'
        )
    taken = {each.peer for each in what_if.members}
    name = _DRIVER if _DRIVER not in taken else f"{_DRIVER} (not in the pool file)"
    driver = Member(peer=name, name=name, device=what_if.members[0].device, dialable=True)
    return dataclasses.replace(
        what_if,
        owner=driver,
        hardware=(*what_if.hardware, None),
        up_bytes_per_s=np.append(what_if.up_bytes_per_s, np.inf),
        down_bytes_per_s=np.append(what_if.down_bytes_per_s, np.inf),
        regions=(*what_if.regions, name),
        region=np.append(what_if.region, len(what_if.regions)),
        rtt_s=np.pad(what_if.rtt_s, (0, 1)),
        cap_bytes_per_s=np.pad(what_if.cap_bytes_per_s, (0, 1), constant_values=np.inf),
    )


def offered(request: Request, what_if: WhatIfPool) -> WhatIfPool:
    """Return the machines of a pool that the job wants, in its order.

    Raises:
        PlacementError: it names one that the pool does not have.
    """
    if not request.machines:
        return what_if
    known = {each.name: index for index, each in enumerate(what_if.members)}
    if missing := [name for name in request.machines if name not in known]:
        near = get_close_matches(missing[0], known, n=3)
        raise PlacementError(
            f"placement.machines names {', '.join(missing)}, but the pool file has no such machine; "
            + (f"did you mean {' or '.join(near)}?" if near else f"its machines are {_first_few(list(known))}")
        )
    return part_of(what_if, [known[name] for name in request.machines])


def part_of(what_if: WhatIfPool, members: Sequence[int]) -> WhatIfPool:
    """Return the pool of some of the members, by their numbers, and the owner's machine if there is one."""
    kept = [*members, *(() if what_if.owner_index is None else (what_if.owner_index,))]
    return dataclasses.replace(
        what_if,
        members=tuple(what_if.members[index] for index in members),
        hardware=tuple(what_if.hardware[index] for index in kept),
        up_bytes_per_s=what_if.up_bytes_per_s[kept],
        down_bytes_per_s=what_if.down_bytes_per_s[kept],
        region=what_if.region[kept],
    )


def searched(request: Request, what_if: WhatIfPool) -> WhatIfPool:
    """Return the part of a pool among which one pipeline is sought; `what_if` has an owner.

    All of a pool of up to `MOST_SEARCHED` machines. Of a larger one the machines of the best single chains that the
    planner of many pipelines finds; with `compnodes` chosen and more than those, the fastest others are added.

    Raises PlacementError when no single chain holds the model.
    """
    if len(what_if.members) <= MOST_SEARCHED or request.in_order:
        return what_if
    chain = machines_of_single_chains(_problem_of_pool(request, what_if), MOST_SEARCHED)
    if not chain:
        # Raises with what is missing in the whole pool, or has a chain that was not among those looked at.
        used = {stage.peer for stage in best_on(request, what_if).pipelines[0].stages}
        chain = tuple(index for index, each in enumerate(what_if.members) if each.peer in used)
    limits = request.problem.limits
    wanted = len(limits.cuts) + 1 if limits.cuts is not None else limits.compnodes
    if len(chain) >= wanted:
        return part_of(what_if, chain)
    by_speed = sorted(
        (index for index, each in enumerate(what_if.members) if index not in set(chain)),
        key=lambda index: -flops_rate(what_if.members[index].device, "matmul", request.problem.precision),
    )
    more = max(wanted, MOST_SEARCHED) - len(chain)
    return part_of(what_if, sorted((*chain, *by_speed[:more])))


def setting_of(what_if: WhatIfPool) -> Setting:
    """Return the machines of a pool that has an owner, every link written out."""
    assert what_if.owner is not None
    return Setting(what_if.pool(), what_if.owner)


def plan_on(request: Request, setting: Setting) -> Plan:
    """Return the plan that the broker of such a pool would make: of one pipeline. Raises as `planner.plan`."""
    return planner.plan(one_pipeline_on(request, setting))


def one_pipeline_on(request: Request, setting: Setting) -> TrainingProblem:
    """Return the problem of one pipeline on some machines, as a broker of theirs would have it."""
    limits = dataclasses.replace(request.problem.limits, in_order=request.in_order, most_pipelines=1)
    problem = dataclasses.replace(request.problem, limits=limits, remedies=DESCRIBED)
    return problem.on_pool(setting.pool, setting.owner)


def best_on(request: Request, what_if: WhatIfPool) -> Plan:
    """Return the best plan of any number of pipelines; `what_if` has an owner. Raises as `planner.plan`.

    Blocks for up to a minute with ten thousand machines.
    """
    return planner.plan(_problem_of_pool(request, what_if))


def _problem_of_pool(request: Request, what_if: WhatIfPool) -> TrainingProblem:
    """Return the problem on a whole pool, free of the job's own wishes."""
    return dataclasses.replace(
        request.problem,
        members=what_if.members,
        owner=what_if.owner,
        links=what_if,
        lines=(what_if.up_bytes_per_s, what_if.down_bytes_per_s),
        limits=PlanLimits(),
        remedies=DESCRIBED,
    )


def plan_with(request: Request, what_if: WhatIfPool, index: int) -> Plan:
    """Return the plan for member `index` of a pool with an owner; in a private job the owner's keeps its part.

    Raises PlacementError when it does not fit.
    """
    return plan_on(_undivided(request), setting_of(part_of(what_if, (index,))))


def plan_at_home(request: Request, owner: Member) -> Plan:
    """Return the plan that trains everything on the owner's machine. Raises PlacementError when it does not fit."""
    # Nothing leaves the machine, so nothing of it needs to be kept apart.
    undivided = _undivided(request)
    whole = dataclasses.replace(undivided.problem, privacy="open", front=0, back=len(request.problem.graph.nodes))
    return plan_on(dataclasses.replace(undivided, problem=whole), Setting(Pool((owner,)), owner))


def _undivided(request: Request) -> Request:
    """Return the request for one machine, without cut positions to search: only the stages that will run are costed."""
    return dataclasses.replace(request, problem=request.problem.within(PlanLimits(cuts=())), machines=())


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
