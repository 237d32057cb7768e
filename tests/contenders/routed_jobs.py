"""Small routed jobs whose seconds are given, for the tests of routing and its simulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contenders.routers.routed_job import RoutedJob, SharedWeights
from fusionai.scheduling.pipeline import Edge, StageTimes


def routed(
    machines: int,
    stages: int,
    *,
    microbatches: int,
    forward_s: float = 1.0,
    backward_s: float = 2.0,
    speeds: Sequence[float] | None = None,
    boundary_bytes: float = 0.0,
    bytes_per_s: float = 1.0,
    delay_s: float = 0.0,
    state_bytes: float = 0.0,
    weight_bytes: float = 0.0,
    in_flight: int = 4,
    driver: int = -1,
) -> RoutedJob:
    """Return a job of equal stages on machines m0, m1, ... whose links are all alike; any may hold any stage."""
    slow = 1 / np.asarray(speeds if speeds is not None else [1.0] * machines)
    shape = stages, machines
    bandwidth = np.full((machines, machines), bytes_per_s)
    delays = np.full((machines, machines), delay_s)
    np.fill_diagonal(bandwidth, np.inf)
    np.fill_diagonal(delays, 0.0)
    inner = (boundary_bytes,) * (stages - 1)
    return RoutedJob(
        peers=tuple(f"m{number}" for number in range(machines)),
        microbatches=microbatches,
        forward_s=np.broadcast_to(forward_s * slow, shape).copy(),
        backward_s=np.broadcast_to(backward_s * slow, shape).copy(),
        deferred_s=np.zeros(shape),
        update_s=np.zeros(shape),
        in_flight=np.full(shape, in_flight, dtype=np.int64),
        forward_bytes=(0.0, *inner),
        gradient_bytes=(0.0, *inner),
        state_bytes=(state_bytes,) * stages,
        weights=tuple(SharedWeights((stage,), weight_bytes) for stage in range(stages)) if weight_bytes else (),
        bandwidth=bandwidth,
        delay_s=delays,
        driver=driver,
    )


def one_each(stages: Sequence[StageTimes], edges: Sequence[Edge], microbatches: int) -> RoutedJob:
    """Return a pipeline as a routed job: stage k on machine k only, links of one byte a second."""
    count = len(stages)
    shape = count, count
    forward, backward = np.full(shape, np.inf), np.full(shape, np.inf)
    deferred, in_flight = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    for number, stage in enumerate(stages):
        forward[number, number], backward[number, number] = stage.forward_s, stage.backward_s
        deferred[number, number], in_flight[number, number] = stage.deferred_s, stage.in_flight
    there, home, delays = [0.0] * count, [0.0] * count, np.zeros(shape)
    for edge in edges:
        there[edge.target], home[edge.target] = edge.forward_s, edge.backward_s or 0.0
        delays[edge.source, edge.target] = delays[edge.target, edge.source] = edge.delay_s
    return RoutedJob(
        peers=tuple(f"m{number}" for number in range(count)),
        microbatches=microbatches,
        forward_s=forward,
        backward_s=backward,
        deferred_s=deferred,
        update_s=np.zeros(shape),
        in_flight=in_flight,
        forward_bytes=tuple(there),
        gradient_bytes=tuple(home),
        state_bytes=(0.0,) * count,
        weights=(),
        bandwidth=np.ones(shape),
        delay_s=delays,
    )
