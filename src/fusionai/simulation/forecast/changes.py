"""Pools that differ from a given one in one thing: another machine, or better links."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import msgspec
import numpy as np

from fusionai.graph.cuts import boundary_bytes, cut
from fusionai.scheduling.estimator import backward_s, flops_rate, forward_s, send_s
from fusionai.scheduling.pipeline import Line
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import Lines, LinkProfile
from fusionai.simulation.forecast.request import Request, Setting
from fusionai.simulation.hardware.what_if_pool import WhatIfPool


def best_machine(request: Request, what_if: WhatIfPool) -> int:
    """Return the index of the member that computes this job fastest, the first of several."""
    whole, precision = request.whole_cost, request.problem.precision

    def slowness(index: int) -> tuple[float, float]:
        device = what_if.members[index].device
        seconds = forward_s(whole, device, precision) + backward_s(whole, device, precision)
        # Small models keep no GPU busy and take the same time on each, but for rounding: then the one that could do
        # more.
        return float(f"{seconds:.6g}"), -flops_rate(device, "matmul", precision)

    return min(range(len(what_if.members)), key=slowness)


def one_more(what_if: WhatIfPool, index: int) -> WhatIfPool:
    """Return the pool with a second machine like member `index`: the same device, region and lines of its own."""
    like, last = what_if.members[index], len(what_if.members)
    name = f"another {like.name}"
    twin = msgspec.structs.replace(like, peer=name, name=name)
    hardware = [*what_if.hardware]
    hardware.insert(last, what_if.hardware[index])
    return dataclasses.replace(
        what_if,
        members=(*what_if.members, twin),
        hardware=tuple(hardware),
        up_bytes_per_s=np.insert(what_if.up_bytes_per_s, last, what_if.up_bytes_per_s[index]),
        down_bytes_per_s=np.insert(what_if.down_bytes_per_s, last, what_if.down_bytes_per_s[index]),
        region=np.insert(what_if.region, last, what_if.region[index]),
    )


def uplinks_doubled(what_if: WhatIfPool) -> WhatIfPool:
    """Return the pool in which every machine, the owner's too, sends twice as fast; downlinks and routes stay."""
    return dataclasses.replace(what_if, up_bytes_per_s=2 * what_if.up_bytes_per_s)


def link_doubled(setting: Setting, one: str, other: str) -> Setting:
    """Return the setting in which the link between two peers carries twice as much both ways, their lines as well.

    Gradients go back the way that activations came, so one direction alone would leave the other one to wait for.
    """
    pool = setting.pool
    faster = {
        f"{source}>{target}": LinkProfile(link.rtt_s, 2 * link.bandwidth_bytes_per_s)
        for source, target in ((one, other), (other, one))
        for link in (pool.link(source, target),)
    }
    lines = {
        peer: Lines(2 * each.up_bytes_per_s, 2 * each.down_bytes_per_s)
        for peer in (one, other)
        if (each := pool.lines.get(peer)) is not None
    }
    changed = msgspec.structs.replace(pool, links={**pool.links, **faster}, lines={**pool.lines, **lines})
    return dataclasses.replace(setting, pool=changed)


def links_busy_s(request: Request, plan: Plan, setting: Setting) -> dict[tuple[str, str], float]:
    """Return for how many seconds of a step a plan keeps each link busy, by (source, target) peers."""
    peers = [stage.peer for stage in plan.stages]
    busy_s: defaultdict[tuple[str, str], float] = defaultdict(float)
    stages = cut(request.problem.graph, plan.cuts)
    for (source, target), (forward, gradients) in boundary_bytes(stages, request.problem.sizes).items():
        one, other = peers[source], peers[target]
        if one != other:
            busy_s[one, other] += plan.microbatches * send_s(forward, setting.pool.link(one, other))
            busy_s[other, one] += plan.microbatches * send_s(gradients, setting.pool.link(other, one))
    return dict(busy_s)


def lines_busy_s(request: Request, plan: Plan, setting: Setting) -> dict[Line, float]:
    """Return for how many seconds of a step a plan keeps each uplink and downlink busy, by (peer, direction)."""
    peers, lines = [stage.peer for stage in plan.stages], setting.pool.lines
    busy_s: defaultdict[Line, float] = defaultdict(float)
    stages = cut(request.problem.graph, plan.cuts)
    for (source, target), crossing in boundary_bytes(stages, request.problem.sizes).items():
        ends = peers[source], peers[target]
        for (one, other), size_bytes in zip((ends, ends[::-1]), crossing, strict=True):
            if one != other:
                up, down = lines.get(one), lines.get(other)
                busy_s[one, "up"] += plan.microbatches * size_bytes / up.up_bytes_per_s if up else 0.0
                busy_s[other, "down"] += plan.microbatches * size_bytes / down.down_bytes_per_s if down else 0.0
    return dict(busy_s)
