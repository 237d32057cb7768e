"""Placements by simple rules: starts for our own search."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fusionai.errors import PlacementError
from fusionai.scheduling.links import Indices
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange
from fusionai.scheduling.serving.serving_task import ServingTask

_MOST_REPLICAS = 8

WEIGHTS_SHARE = 0.535
"""Share of the memory offered that other systems fill with weights: of 90 % of a board about half the board. It gives
what Helix's baselines hold by its artifact's profiles: of LLaMA-2-70B 12 layers on an A100 of 40 GB, 7 on an L4, 4 on a
T4."""


def petals_like(evaluator: Evaluator) -> list[HeldRange]:
    """Return the placement of machines that come one after another and take what has least throughput.

    Petals (Borzunov et al., arXiv 2312.08361, section 3.2): a server holds as many consecutive blocks as it can, where
    the sum of the throughputs of those that hold them already is least.
    """
    task = evaluator.task
    held_S = np.zeros(task.back)
    shares = []
    for machine in range(len(task.members)):
        count = most_segments(evaluator, machine)
        if count == 0:
            continue
        starts = range(task.front, task.back - count + 1)
        # The weakest block counts first, then the sum, so that no hole is left beside a thin spot.
        first = min(starts, key=lambda k: (sorted(held_S[k : k + count]), k))
        held_S[first : first + count] += block_tokens_per_s(evaluator, machine) / count
        shares.append(HeldRange(first + count, first, machine))
    return shares


def separate_pipelines(evaluator: Evaluator) -> list[HeldRange]:
    """Return one pipeline, or several, of each kind of machine alone; kinds that cannot hold the model are left out.

    As many replicas as memory allows with `WEIGHTS_SHARE`, else one in all of the memory; equal parts.
    """
    task = evaluator.task
    shares: list[HeldRange] = []
    for kind in range(int(evaluator.kind_of.max()) + 1):
        machines = [int(each) for each in np.nonzero(evaluator.kind_of == kind)[0]]
        count = most_segments(evaluator, machines[0])
        replicas = max(1, len(machines) * count // (task.back - task.front))
        shares += _chains(evaluator, np.asarray(machines), replicas)
    return shares


def best_replicas(evaluator: Evaluator) -> list[HeldRange]:
    """Return pipelines of one kind of machine each, as many of each kind as give most; equal parts."""
    shares: list[HeldRange] = []
    for kind in range(int(evaluator.kind_of.max()) + 1):
        machines = np.nonzero(evaluator.kind_of == kind)[0]
        best: tuple[float, list[HeldRange]] = (0.0, [])
        for replicas in range(1, min(len(machines), _MOST_REPLICAS) + 1):
            part = _chains(evaluator, machines, replicas)
            found = evaluator.evaluate(part, rounds=4)
            if found is not None and found.tokens_per_s > best[0]:
                best = (found.tokens_per_s, part)
        shares += best[1]
    return shares


def _chains(evaluator: Evaluator, machines: Indices, replicas: int) -> list[HeldRange]:
    """Return so many pipelines of equal parts, without those whose parts do not fit."""
    shares = []
    for group in np.array_split(machines, replicas):
        borders = equal_borders(evaluator.task, min(len(group), evaluator.task.model.blocks))
        part = [
            HeldRange(stop, start, int(machine))
            for machine, (start, stop) in zip(group, pairwise(borders), strict=False)
        ]
        kinds = evaluator.kind_of[[share.machine for share in part]]
        fits = evaluator.times.sequences[kinds, [share.first for share in part], [share.last for share in part]] >= 1
        if fits.all():
            shares += part
    return shares


def most_segments(evaluator: Evaluator, machine: int) -> int:
    """Return how many blocks fit `WEIGHTS_SHARE` of a machine's memory, at least one if one fits at all."""
    task = evaluator.task
    offered = task.members[machine].device.memory_bytes * WEIGHTS_SHARE
    middle = (task.front + task.back) // 2
    count = int(offered / float(task.model.weight_bytes_S[middle]))
    fits = evaluator.times.sequences[evaluator.kind_of[machine], middle, middle + 1] >= 1
    return min(max(count, 1), task.back - task.front) if fits else 0


def block_tokens_per_s(evaluator: Evaluator, machine: int) -> float:
    """Return the tokens per second of one block, with so many sequences as all of its memory holds of one."""
    middle = (evaluator.task.front + evaluator.task.back) // 2
    kind = evaluator.kind_of[machine]
    return float(evaluator.times.at(kind, middle, middle + 1).tokens_per_s(np.asarray(0.0)))


def equal_borders(task: ServingTask, parts: int) -> list[int]:
    """Return borders of equal parts; embedding and head go with the first and last blocks."""
    low, high = max(task.front, 1), min(task.back, task.model.blocks + 1)
    if parts > high - low:
        raise PlacementError(
            f"{task.model.name} has {high - low} blocks, too few for {parts} stages; use fewer compnodes"
        )
    inner = [low + round((high - low) * part / parts) for part in range(1, parts)]
    return [task.front, *inner, task.back]
