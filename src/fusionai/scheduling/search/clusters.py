"""Clusters of machines that reach each other fast, by Louvain's method on the graph of bandwidths.

As OP-Fence does (FusionLLM, arXiv 2410.12707): vertices are machines, weights are bandwidths, and communities are the
clusters. A pool of thousands has too many pairs, so machines with about equal links are one vertex there, weighted by
their number.
"""

from __future__ import annotations

import networkx as nx
import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.problem import TrainingProblem

_MOST_VERTICES = 96
"""Machines, or classes of them, in the graph given to Louvain: its edges grow with the square."""

_MOST_PROBES = 40
"""Machines whose links to everybody are looked at to tell classes apart."""

_NEAR = 1.3
"""Times the hop to a machine's nearest, up to which others are in one cluster of near machines with it."""

_SEED = 0


def clustered(problem: TrainingProblem, machines: Indices) -> list[Indices]:
    """Return the clusters of `machines`, the largest first; members of equal links lie next to each other."""
    classes = _vertices(problem, machines)
    if len(classes) == 1:
        return classes
    graph = _bandwidth_graph(problem, classes)
    found = nx.community.louvain_communities(graph, weight="weight", seed=_SEED)
    return _largest_first([np.concatenate([classes[vertex] for vertex in sorted(each)]) for each in found])


def near_clusters(problem: TrainingProblem, machines: Indices, hop_bytes: float) -> list[Indices]:
    """Return smaller clusters of `machines`: who is about as near to each other as to the nearest of all.

    Louvain's communities join two sites that a good link joins. Between sites a pipeline should not be cut, and which
    sites sum their gradients with which is a question of its own. `hop_bytes` are those that a link is weighed by.
    """
    classes = _vertices(problem, machines)
    first, last = (np.asarray([each[place] for each in classes]) for place in (0, -1))
    with np.errstate(divide="ignore"):
        hop_s = hop_bytes / problem.bandwidths(first[:, None], last[None]) + problem.delays(first[:, None], last[None])
    hop_s = np.maximum(hop_s, hop_s.T)
    alone = np.asarray([len(each) == 1 for each in classes])
    hop_s[alone, alone] = np.inf
    nearest_s = hop_s.min(axis=1)
    near = np.isfinite(hop_s) & (hop_s <= _NEAR * np.maximum(nearest_s[:, None], nearest_s[None]))
    graph = nx.Graph(np.argwhere(near).tolist())
    graph.add_nodes_from(range(len(classes)))
    return _largest_first(
        [np.concatenate([classes[vertex] for vertex in sorted(each)]) for each in nx.connected_components(graph)]
    )


def _vertices(problem: TrainingProblem, machines: Indices) -> list[Indices]:
    """Return machines one by one, or classes of those with about equal links where there are too many."""
    classes = [machines[k : k + 1] for k in range(len(machines))]
    for steps_per_octave in (2.0, 1.0, 0.5, 0.25):
        if len(classes) <= _MOST_VERTICES:
            break
        classes = _classes(problem, machines, steps_per_octave)
    if len(classes) > _MOST_VERTICES:
        # What is still told apart is small: the rest is one class, so that nobody is lost.
        classes.sort(key=len, reverse=True)
        classes = [*classes[: _MOST_VERTICES - 1], np.concatenate(classes[_MOST_VERTICES - 1 :])]
    return classes


def _largest_first(clusters: list[Indices]) -> list[Indices]:
    return sorted(clusters, key=lambda each: (-len(each), int(each.min())))


def _bandwidth_graph(problem: TrainingProblem, classes: list[Indices]) -> nx.Graph:
    first = np.asarray([each[0] for each in classes])
    sizes = np.asarray([len(each) for each in classes], dtype=np.float64)
    out = problem.bandwidths(first[:, None], first[None])
    bandwidth = np.minimum(out, out.T)
    for vertex, each in enumerate(classes):
        bandwidth[vertex, vertex] = float(problem.bandwidths(int(each[0]), int(each[-1]))) if len(each) > 1 else 0.0
    weights = bandwidth * sizes[:, None] * sizes[None]
    np.fill_diagonal(weights, np.diag(bandwidth) * sizes * (sizes - 1) / 2)
    weights /= max(float(weights.max()), 1e-300)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(classes)))
    graph.add_weighted_edges_from(
        (one, other, float(weights[one, other]))
        for one in range(len(classes))
        for other in range(one, len(classes))
        if weights[one, other] > 0
    )
    return graph


def _classes(problem: TrainingProblem, machines: Indices, steps_per_octave: float) -> list[Indices]:
    """Return machines by class of links: alike, in steps of a logarithmic scale, to each of a few probes.

    The next probe is always one of the largest class that has none yet.
    """
    label = np.zeros(len(machines), dtype=np.int64)
    probed: set[int] = set()
    for _ in range(_MOST_PROBES):
        values, counts = np.unique(label, return_counts=True)
        free = [
            (int(count), int(value))
            for value, count in zip(values, counts, strict=True)
            if count > 1 and value not in set(label[list(probed)].tolist())
        ]
        if not free:
            break
        value = max(free, key=lambda each: (each[0], -each[1]))[1]
        probe = int(np.flatnonzero(label == value)[0])
        probed.add(probe)
        label = np.unique(
            np.stack([label, _steps(problem, machines, probe, steps_per_octave)]), axis=1, return_inverse=True
        )[1].ravel()
    return [machines[label == value] for value in np.unique(label)]


def _steps(problem: TrainingProblem, machines: Indices, probe: int, steps_per_octave: float) -> Indices:
    """Return each machine's links with a probe as one number of steps; the probe itself is as its best neighbours."""
    source = np.full(len(machines), machines[probe])

    def steps(values: Floats) -> Indices:
        return np.round(steps_per_octave * np.log2(np.clip(values, 1e-9, 1e18))).astype(np.int64)

    out, home = steps(problem.bandwidths(source, machines)), steps(problem.bandwidths(machines, source))
    delay = steps(np.maximum(problem.delays(source, machines), 1e-4))
    others = np.arange(len(machines)) != probe
    best = int(np.argmax(np.where(others, out, -(1 << 40))))
    for table in (out, home, delay):
        table[probe] = table[best]
    joined = np.unique(np.stack([out, home, delay]), axis=1, return_inverse=True)[1]
    return np.asarray(joined, dtype=np.int64).ravel()
