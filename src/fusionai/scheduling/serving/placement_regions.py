"""Clusters of machines that reach each other fast, by Louvain's method on the graph of bandwidths."""

from __future__ import annotations

import networkx as nx
import numpy as np

from fusionai.scheduling.serving.serving_task import ServingTask

_SEED = 0


def regions_of(task: ServingTask) -> list[tuple[int, ...]]:
    """Return the members by cluster, the largest first: communities of the graph whose weights are bandwidths.

    As OP-Fence does (FusionLLM, arXiv 2410.12707). Where all links are alike there is one cluster.
    """
    count = len(task.members)
    if count == 1:
        return [(0,)]
    both = np.minimum(task.bandwidth_NN, task.bandwidth_NN.T)[:count, :count]
    delay = np.maximum(task.delay_NN, task.delay_NN.T)[:count, :count]
    pairs = ~np.eye(count, dtype=bool)
    if all((figures[pairs] == figures[pairs][0]).all() for figures in (both, delay)):
        return [tuple(range(count))]
    weights = np.where(np.isfinite(both), both, 0.0)
    weights /= max(float(weights.max()), 1e-300)
    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_weighted_edges_from(
        (one, other, float(weights[one, other]))
        for one in range(count)
        for other in range(one + 1, count)
        if weights[one, other] > 0
    )
    found = nx.community.louvain_communities(graph, weight="weight", seed=_SEED)
    return sorted((tuple(sorted(each)) for each in found), key=lambda each: (-len(each), each))
