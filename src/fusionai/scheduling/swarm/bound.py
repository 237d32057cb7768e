"""How fast a step could at most be."""

from __future__ import annotations

import numpy as np

from fusionai.graph.cost import node_costs
from fusionai.graph.cuts import cut
from fusionai.graph.dependencies import local_nodes
from fusionai.graph.vocabulary import operator
from fusionai.scheduling.estimator import flops_rate
from fusionai.scheduling.links import Floats
from fusionai.scheduling.swarm.work import Work


def bound_s(work: Work) -> float:
    """Return a step time that no plan cutting at the planner's positions goes below: computing alone, divided freely.

    Let w[n, s] be the seconds of segment s on machine n. However the segments of all microbatches are dealt out, in
    fractions even, a step takes at least sum over s of min over n of z[n] w[n, s] for any z >= 0 that sums to 1 (weak
    duality of the linear programme of dealing out). z is chosen in proportion to the machines' speeds on the whole,
    which makes it all work over the sum of rates where machines have the same strengths. What each stage may have to
    compute again, starting operators, updates and links count nothing. The owner's machine counts as one more that
    could do anything, and the job takes no less than its own pinned stages take there.
    """
    task = work.task
    seconds_NS = _least_seconds(work)
    members = seconds_NS if task.pinned else seconds_NS[: len(task.members)]
    speed = 1 / members.sum(axis=1)
    shares = speed / speed.sum()
    bound = float((shares[:, None] * members).min(axis=0).sum())
    return task.microbatches * max(bound, work.owner_s if task.pinned else 0.0)


def _least_seconds(work: Work) -> Floats:
    """Return (N, S): seconds of the segments' own operators, each counted where it is made and never again."""
    task = work.task
    whole = cut(task.graph, [])[0]
    costs = {node.name: cost for node, cost in zip(whole.nodes, node_costs(whole, task.sizes), strict=True)}
    again = local_nodes(task.graph)
    bounds = np.asarray(work.positions)
    classes = sorted({operator(node.op).op_class for node in task.graph.nodes})
    flops_CS = np.zeros((len(classes), work.count))
    moved_S = np.zeros(work.count)
    for place, node in enumerate(task.graph.nodes):
        if place in again or node.name not in costs or not bounds[0] <= place < bounds[-1]:
            continue
        cost, segment = costs[node.name], int(np.searchsorted(bounds, place, side="right")) - 1
        flops_CS[classes.index(cost.op_class), segment] += cost.forward_flops + cost.backward_flops
        moved_S[segment] += cost.forward_bytes + cost.backward_bytes
    used = [index for index in range(len(classes)) if flops_CS[index].any()]
    rates_NC = np.asarray(
        [[flops_rate(each.device, classes[index], task.precision) for index in used] for each in task.machines]
    ).reshape(len(task.machines), len(used))
    moving_N = np.asarray([each.device.memory_bytes_per_s for each in task.machines])
    return np.asarray((1 / rates_NC) @ flops_CS[used] + moved_S[None] / moving_N[:, None])
