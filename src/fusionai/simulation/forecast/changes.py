"""Pools that differ from a given one in one thing: another machine, or better links."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from fusionai.scheduling.estimator import backward_s, flops_rate, forward_s
from fusionai.scheduling.evaluation import evaluated_again
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import Lines, LinkProfile
from fusionai.simulation.forecast.request import Request, Setting, one_pipeline_on
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


def links_and_lines_busy_s(
    request: Request, plan: Plan, setting: Setting
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """Return the seconds of a step for which a plan of one pipeline keeps each link and each line busy.

    Links are named by their (source, target) peers; uplinks and downlinks by (peer, direction).
    """
    problem = one_pipeline_on(request, setting)
    (pipeline,) = evaluated_again(problem, plan).pipelines
    times, peers = pipeline.times, {str(number): each.peer for number, each in enumerate(problem.machines)}
    links = {(peers[one], peers[other]): seconds for (one, other), seconds in times.link_busy_s.items()}
    return links, {(peers[machine], way): seconds for (machine, way), seconds in times.line_busy_s.items()}
