"""The placement of a model for serving: `plan_serving`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from fusionai.errors import PlacementError
from fusionai.scheduling.serving.latency import fastest_route
from fusionai.scheduling.serving.serving_assembly import assembled
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_plan import ServingPlan
from fusionai.scheduling.serving.serving_shortage import nothing_fits
from fusionai.scheduling.serving.serving_task import ServingTask
from fusionai.scheduling.serving.throughput import best_throughput

PLANNER = "fusionai"


def plan_serving(task: ServingTask, previous: ServingPlan | None = None) -> ServingPlan:
    """Return the best placement found for a task's objective.

    "latency" is the one on which a single stream gets its tokens fastest, proven unless `bound_token_s` is lower than
    `predicted_token_s`. "throughput" gives the most tokens per second over all requests; in pools small enough it is
    proven too, in others it is a search with a fixed budget, so equal tasks get equal plans. Takes seconds at most; the
    only clock read is that for `planning_s`.

    Args:
        task: the model, the machines, and the load.
        previous: a plan for some of the same machines; for throughput the search starts from it, too.

    Raises:
        PlacementError: no placement fits; the text says what is missing and by how much.
        ConfigError: the task is malformed.
    """
    begun_s = time.perf_counter()
    evaluator = Evaluator(task)
    route = fastest_route(evaluator)
    if route is None:
        raise nothing_fits(evaluator)
    if task.objective == "latency":
        found = evaluator.evaluate(route.shares)
        if found is None:
            raise nothing_fits(evaluator)
        plan = assembled(evaluator, found, planner=PLANNER, bound_token_s=route.bound_s, route=route)
    else:
        best = best_throughput(evaluator, [route.shares, *_kept(task, previous)])
        if best is None:
            raise nothing_fits(evaluator)
        plan = assembled(evaluator, best.evaluated, planner=PLANNER, bound_token_s=route.bound_s)
        if best.exact:
            plan = msgspec.structs.replace(plan, bound_tokens_per_s=plan.predicted_tokens_per_s)
    return msgspec.structs.replace(plan, planning_s=time.perf_counter() - begun_s)


def plan_of_placement(evaluator: Evaluator, placement: Sequence[HeldRange], planner: str) -> ServingPlan:
    """Return the plan of a given placement: what flows over it, and how much.

    Raises PlacementError when nothing can flow: parts of the model are held by nobody, or too much by somebody.
    """
    found = evaluator.evaluate(placement)
    if found is None:
        model = evaluator.task.model.name
        raise PlacementError(
            f"nothing can flow through the placement that {planner} makes for {model} on {len(evaluator.task.members)} "
            "compnodes: parts of the model fit nobody, or machines that follow each other cannot be linked; use "
            "plan_serving, or add memory"
        )
    route = fastest_route(evaluator)
    bound_s = found.token_s if route is None else route.bound_s
    return assembled(evaluator, found, planner=planner, bound_token_s=bound_s)


def _kept(task: ServingTask, previous: ServingPlan | None) -> list[tuple[HeldRange, ...]]:
    """Return a former plan's placement as far as its machines are still there."""
    if previous is None or previous.graph_hash != task.model.graph_hash:
        return []
    place = {member.peer: index for index, member in enumerate(task.members)}
    return [
        tuple(HeldRange(shard.last, shard.first, place[shard.peer]) for shard in previous.shards if shard.peer in place)
    ]
