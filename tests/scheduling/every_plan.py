"""Every plan of a small job, and random running jobs with the best re-planning of them, which tries them all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
from decoder_graph import SIZES, decoder, member
from training_problems import one_pipeline

from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.model import OpDag
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.evaluation import Evaluated, evaluated_again, evaluated_one
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Pool
from fusionai.scheduling.search.one_pipeline import in_flight_limits
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.training.corrections import corrected

OWNER = member("owner", gflops=50.0)


@dataclass(frozen=True)
class Case:
    """A running job, and the pool as it is now."""

    graph: OpDag
    running: Plan
    pool: Pool
    microbatches: int
    steps_left: int

    @property
    def problem(self) -> TrainingProblem:
        return one_pipeline(self.graph, self.pool, OWNER, microbatches=self.microbatches)


def planned(graph: OpDag, offered: Pool, microbatches: int, compnodes: int = 0) -> Plan:
    return plan(one_pipeline(graph, offered, OWNER, microbatches=microbatches, compnodes=compnodes))


def every_plan(problem: TrainingProblem, positions: Sequence[int]) -> Iterator[Evaluated]:
    """Yield the plan of each set of machines, their order and cuts at `positions`, with as much in flight as fits."""
    for count in range(1, len(problem.members) + 1):
        for order in itertools.permutations(range(len(problem.members)), count):
            for inner in itertools.combinations(positions, count - 1):
                limits = in_flight_limits(problem.microbatches, count)
                tries = (evaluated_one(problem, inner, order, limit) for limit in limits)
                fitting = next((tried for tried in tries if tried.possible), None)
                if fitting is not None:
                    yield fitting


def links_between(peers: list[str], draw: random.Random) -> dict[str, LinkProfile]:
    return {
        f"{one}>{other}": LinkProfile(10 ** draw.uniform(-5, -3), 10 ** draw.uniform(7, 9.5))
        for one, other in itertools.permutations(peers, 2)
    }


def slowed(offered: Pool, peer: str, factor: float) -> Pool:
    """Return the pool with one machine that many times slower."""
    members = tuple(
        msgspec.structs.replace(each, device=corrected(each.device, factor)) if each.peer == peer else each
        for each in offered.members
    )
    return msgspec.structs.replace(offered, members=members)


def without(offered: Pool, peer: str) -> Pool:
    """Return the pool after one machine has left."""
    return msgspec.structs.replace(offered, members=tuple(each for each in offered.members if each.peer != peer))


def case(seed: int) -> Case:
    """Return a job on two or three machines of which one was throttled, or left, or to which one has come."""
    draw = random.Random(seed)
    graph = decoder(draw.choice((1, 2)), hidden=draw.choice((128, 256)), tied=draw.random() < 0.3)
    # In half of the cases no machine holds everything.
    whole = stage_cost(cut(graph, [])[0], SIZES).training_bytes(2, 2) * MEMORY_MARGIN
    memory_bytes = int(whole * draw.choice((0.9, 10)))
    members = [member(name, gflops=draw.uniform(50, 150), memory_bytes=memory_bytes) for name in "abc"]
    links = links_between([*(each.peer for each in members), OWNER.peer], draw)
    microbatches = draw.choice((1, 2, 4, 8))
    pool = Pool(tuple(members), links)
    what = draw.choice(("throttled", "left", "joined"))
    first = msgspec.structs.replace(pool, members=pool.members[:2]) if what == "joined" else pool
    running = planned(graph, first, microbatches, compnodes=draw.choice((0, 2, 2, len(first.members))))
    victim = draw.choice(running.stages).peer
    if what == "throttled":
        pool = slowed(pool, victim, draw.uniform(1.2, 4))
    elif what == "left":
        pool = without(pool, victim)
    return Case(graph, running, pool, microbatches, round(10 ** draw.uniform(0, 4)))


def weights_by_peer(graph: OpDag, made: Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for subdag, stage in zip(cut(graph, made.cuts), made.stages, strict=True):
        found.setdefault(stage.peer, set()).update(weight.key for weight in subdag.weights)
    return found


def hauling_s(each: Case, made: Plan) -> float:
    """Return the seconds of all moves to `made`, counted by hand."""
    before, after = weights_by_peer(each.graph, each.running), weights_by_peer(each.graph, made)
    nbytes = {weight.key: 3 * type_bytes(weight.type, SIZES) for weight in each.graph.weights}
    there = [one.peer for one in each.pool.members]
    leaving, entering, latency_s = dict.fromkeys(there, 0.0), dict.fromkeys(there, 0.0), 0.0
    for peer, keys in after.items():
        for key in keys - before.get(peer, set()):
            holders = [one for one in there if key in before.get(one, set())]
            others = holders or [one for one in (*there, OWNER.peer) if one != peer]
            ways = {one: each.pool.link(one, peer) for one in others}
            best = max(ways, key=lambda one: ways[one].bandwidth_bytes_per_s)
            seconds = nbytes[key] / ways[best].bandwidth_bytes_per_s
            entering[peer] += seconds
            if holders:
                leaving[best] += seconds
            latency_s = max(latency_s, ways[best].rtt_s / 2)
    return max(*leaving.values(), *entering.values()) + latency_s


def kept_s(each: Case) -> float | None:
    """Return the seconds of the steps left with the running plan, None if it cannot run."""
    if {stage.peer for stage in each.running.stages} - {one.peer for one in each.pool.members}:
        return None
    return each.steps_left * evaluated_again(each.problem, each.running).step_s


def least_s(each: Case) -> float:
    """Return the least seconds of moves and steps over every placement and every cut at the planner's positions."""
    positions = sorted({*cut_points(each.graph, SIZES), *each.running.cuts})
    return min(
        each.steps_left * made.step_s + hauling_s(each, made.plan()) for made in every_plan(each.problem, positions)
    )
