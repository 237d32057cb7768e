"""Whether one machine alone would do: the pool's, each by itself, and the owner's."""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from fusionai.errors import PlacementError
from fusionai.graph.cost import StageCost
from fusionai.scheduling.estimator import flops_rate, training_memory_bytes
from fusionai.scheduling.explain import WITH_MARGIN, shortage_texts
from fusionai.scheduling.profile import DeviceProfile, Member
from fusionai.scheduling.segments import MEMORY_MARGIN, reachable
from fusionai.simulation.forecast.offload import Offload, offloaded
from fusionai.simulation.forecast.request import Request, plan_at_home, plan_with
from fusionai.simulation.hardware.what_if_pool import WhatIfPool

_MOST_KINDS = 24
"""Kinds of machines that are planned for, the fastest by peak: a pool may have thousands."""


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """What a single machine would do with the job."""

    machine: str
    alike: int
    """Machines of the pool that are just like it, with the same links, itself included."""
    with_owner: bool
    """Whether the owner's machine keeps its part of a private job; if not, nothing is anywhere else."""
    predicted_step_s: float | None
    """None where the job does not fit."""
    tokens_per_s: float | None
    speedup: float | None
    """Over the plan for the whole pool; above 1, the pool only slows the job down."""
    why_not: str = ""
    """Why it does not fit."""
    offload: Offload | None = None
    """What it could reach with the model's state in its main memory, where it does not fit otherwise and nothing need
    stay elsewhere. `predicted_step_s` is None all the same: this system does not offload."""


def each_alone(request: Request, what_if: WhatIfPool, full: WhatIfPool, pool_step_s: float) -> tuple[Alone, ...]:
    """Return what each kind of machine would do by itself, the fastest first; those that hold too little come last.

    Every figure is a plan's. Machines that are alike in all that a plan sees are planned for once; of more than
    `_MOST_KINDS` kinds, those that compute fastest. The owner's machine, where the pool has one, is tried with the
    whole job. `full` is the pool with somebody to drive the job.
    """
    found = [_with_member(request, full, group, pool_step_s) for group in _groups(request, full)]
    if what_if.owner is not None:
        found.insert(0, at_home(request, what_if.owner, pool_step_s))
    return tuple(sorted(found, key=_order))


def _order(each: Alone) -> tuple[bool, float]:
    """Order by speed, those that would have to offload after those that need not."""
    if each.predicted_step_s is not None:
        return False, each.predicted_step_s
    return True, float("inf") if each.offload is None else each.offload.step_s


def _groups(request: Request, what_if: WhatIfPool) -> list[list[int]]:
    """Return the members that can be linked with the owner, those together that no plan for one could tell apart."""
    assert what_if.owner is not None
    groups: dict[Hashable, list[int]] = {}
    for index, member in enumerate(what_if.members):
        if reachable(member, what_if.owner):
            links = what_if.up_bytes_per_s[index], what_if.down_bytes_per_s[index], what_if.region[index]
            key = msgspec.json.encode(member.device), *(float(each) for each in links)
            groups.setdefault(key, []).append(index)

    def speed(group: list[int]) -> float:
        return flops_rate(what_if.members[group[0]].device, "matmul", request.problem.precision)

    return sorted(groups.values(), key=speed, reverse=True)[:_MOST_KINDS]


def _with_member(request: Request, what_if: WhatIfPool, group: list[int], pool_step_s: float) -> Alone:
    member, with_owner = what_if.members[group[0]], request.problem.privacy == "private"
    if missing := lacking(request, request.shared_cost, member.device):
        return _unfit(request, member, len(group), missing, with_owner=with_owner)
    try:
        step_s = plan_with(request, what_if, group[0]).predicted_step_s
    except PlacementError as error:
        return _unfit(request, member, len(group), str(error), with_owner=with_owner)
    return _fit(request, member, len(group), step_s, pool_step_s, with_owner=with_owner)


def at_home(request: Request, owner: Member, pool_step_s: float) -> Alone:
    """Return what the owner's machine would do with the whole job."""
    if missing := lacking(request, request.whole_cost, owner.device):
        return _unfit(request, owner, 1, missing, with_owner=False)
    try:
        step_s = plan_at_home(request, owner).predicted_step_s
    except PlacementError as error:
        return _unfit(request, owner, 1, str(error), with_owner=False)
    return _fit(request, owner, 1, step_s, pool_step_s, with_owner=False)


def lacking(request: Request, cost: StageCost, device: DeviceProfile) -> str:
    """Return why a stage cannot fit a device, "" if it may: whatever the schedule, so nothing need be planned."""
    need = training_memory_bytes(cost, device, 1, request.problem.optimizer_states) * MEMORY_MARGIN
    if need <= device.memory_bytes:
        return ""
    needed, offered, missing = shortage_texts(need, device.memory_bytes)
    return f"{WITH_MARGIN}, needs at least {needed} and offers {offered}: {missing} are missing"


def _fit(request: Request, member: Member, alike: int, step_s: float, pool_step_s: float, *, with_owner: bool) -> Alone:
    return Alone(
        machine=member.name,
        alike=alike,
        with_owner=with_owner,
        predicted_step_s=step_s,
        tokens_per_s=request.tokens_per_step / step_s,
        speedup=pool_step_s / step_s,
    )


def _unfit(request: Request, member: Member, alike: int, why_not: str, *, with_owner: bool) -> Alone:
    return Alone(
        machine=member.name,
        alike=alike,
        with_owner=with_owner,
        predicted_step_s=None,
        tokens_per_s=None,
        speedup=None,
        why_not=why_not,
        offload=None if with_owner else offloaded(request, member.device),
    )
