"""From an evaluated placement to a plan, with the words that explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fusionai.scheduling.explain import brief_names
from fusionai.scheduling.serving.flow import SINK, SOURCE
from fusionai.scheduling.serving.latency import Route
from fusionai.scheduling.serving.serving_estimator import CHUNK_TOKENS
from fusionai.scheduling.serving.serving_evaluation import EvaluatedPlacement, Evaluator, HeldRange
from fusionai.scheduling.serving.serving_plan import FlowPlan, ServingPlan, ShardPlan
from fusionai.scheduling.serving.serving_task import ServingTask
from fusionai.scheduling.serving.throughput import bound_tokens_per_s
from fusionai.units.byte_counts import bytes_text
from fusionai.units.durations import seconds_text

_FULL = 0.98
"""Share of a capacity from which on it is called exhausted."""

_SLACK = 3.75
"""Times the mean batch that a pass may take: with less, uneven arrivals are not caught up with; with no limit all
gather in one batch. Of 1.25, 2, 3.75 and no limit, 3.75 gave most in simulated runs (docs/serving-placement.md)."""

_MOST_NAMED = 4


def assembled(
    evaluator: Evaluator, found: EvaluatedPlacement, *, planner: str, bound_token_s: float, route: Route | None = None
) -> ServingPlan:
    """Return the plan of a placement.

    Args:
        evaluator: of the task.
        found: the placement under full load; shares that nothing flows through are left out.
        planner: name of who made it.
        bound_token_s: no placement gives one stream its tokens faster.
        route: the single route of a plan for latency.
    """
    task = evaluator.task
    used = {share.machine for share in found.used}
    shards = tuple(
        _shard(evaluator, share, float(rate), float(capacity), float(own_s))
        for share, rate, capacity, own_s in sorted(
            zip(found.shares, found.through_M, found.capacity_M, found.own_s_M, strict=True),
            key=lambda each: each[0].first,
        )
        if share.machine in used
    )
    flows = _flows(evaluator, found, used)
    ceiling = evaluator.ceiling([share for share in found.shares if share.machine in used])
    bottleneck = _bottleneck(evaluator, found, shards, flows) if route is None else _slowest(evaluator, route)
    left_out = tuple(member.peer for index, member in enumerate(task.members) if index not in used)
    token_s = found.token_s if route is None else route.token_s
    return ServingPlan(
        graph_hash=task.model.graph_hash,
        model=task.model.name,
        planner=planner,
        objective="throughput" if route is None else "latency",
        owner=task.gateway_peer,
        private=task.private,
        shards=shards,
        flows=flows,
        prompt_chunk=CHUNK_TOKENS,
        predicted_tokens_per_s=float(found.tokens_per_s),
        predicted_token_s=token_s,
        ceiling_tokens_per_s=ceiling,
        bound_tokens_per_s=max(bound_tokens_per_s(evaluator), float(found.tokens_per_s)),
        bound_token_s=bound_token_s,
        bottleneck=bottleneck,
        left_out=left_out,
        explanation=_lines(task, shards, float(found.tokens_per_s), token_s, bottleneck, left_out, route),
    )


def _shard(evaluator: Evaluator, share: HeldRange, rate: float, capacity: float, own_s: float) -> ShardPlan:
    task = evaluator.task
    times = evaluator.times.at(evaluator.kind_of[share.machine], share.first, share.last)
    return ShardPlan(
        peer=task.members[share.machine].peer,
        start=task.model.positions[share.first],
        stop=task.model.positions[share.last],
        first=share.first,
        last=share.last,
        tokens_per_s=rate,
        capacity_tokens_per_s=capacity,
        sequences=float(times.sequences),
        # By Little's law, so many are there at a time.
        batch=max(1, math.ceil(_SLACK * rate * task.load.decode_share * own_s)),
        memory_bytes=int(times.fixed_bytes),
    )


def _flows(evaluator: Evaluator, found: EvaluatedPlacement, used: set[int]) -> tuple[FlowPlan, ...]:
    task, least = evaluator.task, 1e-6 * found.tokens_per_s
    flows = []
    for arc, rate in zip(found.arcs, found.flows, strict=True):
        if rate <= least:
            continue
        ends = [
            task.gateway_peer if place in (SOURCE, SINK) else task.members[found.shares[place].machine].peer
            for place in (arc.tail, arc.head)
        ]
        flows.append(
            FlowPlan(source=ends[0], target=ends[1], tokens_per_s=rate, capacity_tokens_per_s=float(arc.capacity))
        )
    return tuple(flows)


def _bottleneck(
    evaluator: Evaluator, found: EvaluatedPlacement, shards: Sequence[ShardPlan], flows: Sequence[FlowPlan]
) -> str:
    """Return what is exhausted: machines, links, the owner; or that a better arrangement would be needed."""
    names = _names(evaluator.task)
    if found.tokens_per_s >= evaluator.owner_rate * _FULL:
        return f"the owner's machine, {names[evaluator.task.gateway_peer]}, with embedding and head"
    full = [names[shard.peer] for shard in shards if shard.tokens_per_s >= _FULL * shard.capacity_tokens_per_s]
    links = [
        f"{names[flow.source]} > {names[flow.target]}"
        for flow in flows
        if flow.tokens_per_s >= _FULL * flow.capacity_tokens_per_s
    ]
    parts = []
    if full:
        parts.append(f"{_few(full)}: computing, and room for sequences")
    if links:
        parts.append(f"link{'s' if len(links) > 1 else ''} {_few(links)}")
    return "; ".join(parts) or "routes: no machine and no link is exhausted"


def _slowest(evaluator: Evaluator, route: Route) -> str:
    """Return the stage or hop that takes most of a token's time."""
    task, names = evaluator.task, [each.name for each in evaluator.task.machines]
    times = evaluator.picked(route.shares).pass_s(1.0)
    parts = [(float(second), names[share.machine]) for second, share in zip(times, route.shares, strict=True)]
    way = [task.gateway, *(share.machine for share in route.shares), task.gateway]
    places = [task.front, *(share.last for share in route.shares)]
    gateway = "the gateway" if task.owner is None else task.owner.name
    for source, target, position in zip(way[:-1], way[1:], places, strict=True):
        ends = [gateway if each == task.gateway else names[each] for each in (source, target)]
        parts.append((evaluator.hop_s(source, target, position), f"link {ends[0]} > {ends[1]}"))
    seconds, what = max(parts)
    return f"{what}: {seconds_text(seconds)} of {seconds_text(route.token_s)} a token"


def _lines(
    task: ServingTask,
    shards: Sequence[ShardPlan],
    rate: float,
    token_s: float,
    bottleneck: str,
    left_out: Sequence[str],
    route: Route | None,
) -> tuple[str, ...]:
    names = _names(task)
    offers = {member.peer: member.device.memory_bytes for member in task.members}
    lines = [
        f"{names[shard.peer]}: {_segments(task, shard)}; {bytes_text(shard.memory_bytes)} of "
        f"{bytes_text(offers[shard.peer])}, room for {_count(shard.sequences)}; "
        f"{shard.tokens_per_s:.3g} of {shard.capacity_tokens_per_s:.3g} tokens/s"
        for shard in shards
    ]
    if task.private and task.owner is not None:
        lines.insert(0, f"{task.owner.name}: embedding and head, which see the tokens")
    if route is None:
        lines.append(f"all requests together: {rate:.3g} tokens/s, a token every {seconds_text(token_s)} in each")
    else:
        lines.append(f"one request alone: a token every {seconds_text(token_s)}; full of requests: {rate:.3g} tokens/s")
    lines.append(f"what limits it: {bottleneck}")
    if left_out:
        why = "with them it would not be faster" if route is None else "a further machine would make a stream slower"
        lines.append(f"left out: {brief_names([names[peer] for peer in left_out])} ({why})")
    return tuple(lines)


def _segments(task: ServingTask, shard: ShardPlan) -> str:
    """Return what a shard holds: "embedding, blocks 0-11"."""
    parts = []
    if shard.first == 0:
        parts.append("embedding")
    low, high = max(shard.first, 1) - 1, min(shard.last, task.model.blocks + 1) - 2
    if low == high:
        parts.append(f"block {low}")
    elif low < high:
        parts.append(f"blocks {low}-{high}")
    if shard.last == task.model.blocks + 2:
        parts.append("head")
    return ", ".join(parts)


def _count(sequences: float) -> str:
    return f"{int(sequences)} requests" if np.isfinite(sequences) else "any number of requests"


def _names(task: ServingTask) -> dict[str, str]:
    return {task.gateway_peer: "the gateway"} | {each.peer: each.name for each in task.machines}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
