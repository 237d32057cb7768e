"""From a split to a plan: the very stages it makes are costed, and their schedule is worked through.

The solver reckons with sums over small segments and an ideal pipeline; here the graph is really cut, so seconds, memory
and transfers are those of the stages that will run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from fusionai.graph.cost import StageCost
from fusionai.graph.cuts import Cutter, boundary_bytes
from fusionai.graph.model import OpDag, Sizes, SubDag, WeightKey
from fusionai.graph.shared_weights import repeated, waiting_bytes
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.estimator import (
    backward_s,
    deferred_s,
    delay_s,
    forward_s,
    send_s,
    training_memory_bytes,
    update_s,
)
from fusionai.scheduling.explain import stage_lines
from fusionai.scheduling.in_flight import SLACKS, WORTH_MEMORY, busiest_s, least_held, round_trips_s, widened
from fusionai.scheduling.pipeline import Edge, PipelineTimes, StageTimes, pipeline_times
from fusionai.scheduling.plan import Plan, StagePlan, StagePrediction
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.units.durations import seconds_text


class StageCosts:
    """Stages of one graph at one size, each costed once: many plans that are tried share stages."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], StageCost] = {}
        self._cutter: Cutter | None = None

    def cutter(self, graph: OpDag) -> Cutter:
        """Return what cuts the graph, which is the same in every call."""
        if self._cutter is None:
            self._cutter = Cutter(graph)
        return self._cutter

    def of(self, graph: OpDag, subdag: SubDag, start: int, stop: int, sizes: Sizes) -> StageCost:
        """Return the cost of the graph's nodes [start, stop), which are `subdag`."""
        # What crosses its ends depends on the other cuts, where a value passes over a stage.
        ends = tuple((each.value, each.gradient) for each in (*subdag.receives, *subdag.sends))
        key = (start, stop, len(subdag.receives), ends)
        if key not in self._known:
            (self._known[key],) = self.cutter(graph).costs(sizes).stages([subdag])
        return self._known[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be planned: the graph as arranged, and whom for. Nodes [0, front) and [back, N) are the owner's."""

    graph: OpDag
    graph_hash: str
    sizes: Sizes
    microbatches: int
    optimizer_states: int
    precision: Literal["fp32", "bf16"]
    pool: Pool
    owner: Member
    privacy: Literal["private", "open"]
    front: int
    back: int
    split_backward: bool = True
    """Whether boundary gradients leave before those of weights are computed; a compiled backward is one piece."""
    costs: StageCosts = field(default_factory=StageCosts, repr=False, compare=False)

    def member(self, peer: str) -> Member:
        """Return a machine by its peer."""
        return self.owner if peer == self.owner.peer else next(m for m in self.pool.members if m.peer == peer)

    def link(self, source: str, target: str) -> LinkProfile:
        """Return the link between two machines; within one, nothing takes time."""
        return LinkProfile(0.0, math.inf) if source == target else self.pool.link(source, target)

    def lines_s(self, size_bytes: float, source: str, target: str) -> tuple[float, float]:
        """Return the seconds that bytes take the source's uplink and the target's downlink, where they are shared."""
        lines = self.pool.lines
        up, down = lines.get(source), lines.get(target)
        return size_bytes / up.up_bytes_per_s if up else 0.0, size_bytes / down.down_bytes_per_s if down else 0.0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A plan and the memory that each of its machines needs, estimates with their margin."""

    plan: Plan
    needs_bytes: dict[str, float]
    holds: dict[str, frozenset[WeightKey]]
    """Weights by machine."""

    def overloaded(self, task: Task) -> dict[str, float]:
        """Return the machines that offer too little, with the share of their need that they offer."""
        shares = {peer: task.member(peer).device.memory_bytes / need for peer, need in self.needs_bytes.items() if need}
        return {peer: share for peer, share in shares.items() if share < 1}


def evaluate(task: Task, cuts: Sequence[int], peers: Sequence[str], in_flight_limit: int) -> Evaluated:
    """Return the plan that cuts at `cuts` and runs stage k on `peers[k]`, with what it needs.

    Every stage holds as many microbatches as 1F1B asks for, at most `in_flight_limit`; it holds more as far as memory
    goes and the step becomes shorter.
    """
    stages = _Stages(task, cuts, peers)
    chosen = stages.least_in_flight(in_flight_limit)
    times = stages.times(chosen)
    for slack in SLACKS:
        wider = stages.wider(chosen, slack)
        if wider != chosen and (tried := stages.times(wider)).makespan_s < WORTH_MEMORY * times.makespan_s:
            chosen, times = wider, tried
    return stages.evaluated(chosen, times)


def evaluate_again(task: Task, plan: Plan) -> Evaluated:
    """Return a plan as it is, in-flight limits included, on the machines and links of `task`."""
    stages = _Stages(task, plan.cuts, [stage.peer for stage in plan.stages])
    in_flight = [stage.in_flight for stage in plan.stages]
    return stages.evaluated(in_flight, stages.times(in_flight))


class _Stages:
    """The stages of one way to cut and place a graph."""

    def __init__(self, task: Task, cuts: Sequence[int], peers: Sequence[str]) -> None:
        self._task, self._peers = task, peers
        self._bounds = [0, *cuts, len(task.graph.nodes)]
        self._subdags = task.costs.cutter(task.graph).cut(cuts)
        self._costs = [
            task.costs.of(task.graph, subdag, *ends, task.sizes)
            for subdag, ends in zip(self._subdags, pairwise(self._bounds), strict=True)
        ]
        devices = [task.member(peer).device for peer in peers]
        self._seconds = [
            (forward_s(cost, device, task.precision), backward_s(cost, device, task.precision))
            for cost, device in zip(self._costs, devices, strict=True)
        ]
        self._deferred_s = [
            min(seconds[1], deferred_s(cost, device, task.precision)) if task.split_backward else 0.0
            for cost, device, seconds in zip(self._costs, devices, self._seconds, strict=True)
        ]
        self._again = repeated(self._subdags, peers)
        self._update_s = [
            update_s(cost.trainable_bytes - again.trainable, device, task.optimizer_states)
            for cost, again, device in zip(self._costs, self._again, devices, strict=True)
        ]
        self._edges = self._make_edges()

    def _make_edges(self) -> list[Edge]:
        edges = []
        for (source, target), (forward, gradients) in boundary_bytes(self._subdags, self._task.sizes).items():
            here, there = self._peers[source], self._peers[target]
            out, home = self._task.link(here, there), self._task.link(there, here)
            edges.append(
                Edge(
                    source,
                    target,
                    send_s(forward, out),
                    send_s(gradients, home) if gradients else None,
                    delay_s(out),
                    self._task.lines_s(forward, here, there),
                    self._task.lines_s(gradients, there, here),
                )
            )
        return edges

    def _stage_times(self, in_flight: Sequence[int]) -> list[StageTimes]:
        return [
            StageTimes(peer, forward, backward, held, deferred)
            for peer, (forward, backward), held, deferred in zip(
                self._peers, self._seconds, in_flight, self._deferred_s, strict=True
            )
        ]

    def times(self, in_flight: Sequence[int]) -> PipelineTimes:
        """Work through the schedule."""
        return pipeline_times(self._stage_times(in_flight), self._edges, self._task.microbatches)

    def least_in_flight(self, limit: int) -> tuple[int, ...]:
        """Return what 1F1B holds: as many microbatches as there are stages to go, or fewer where there is no room."""
        one = [1] * len(self._subdags)
        most = [
            self._room(stage, one) if self._peers.count(peer) == 1 else self._task.microbatches
            for stage, peer in enumerate(self._peers)
        ]
        return least_held(most, min(limit, self._task.microbatches))

    def wider(self, in_flight: Sequence[int], slack: float) -> tuple[int, ...]:
        """Return how many each stage must hold to be busy while a microbatch is on its way there and back."""
        stages = self._stage_times(in_flight)
        most = [self._room(stage, in_flight) for stage in range(len(stages))]
        trips_s, period_s = round_trips_s(stages, self._edges), busiest_s(stages, self._edges)
        return widened(in_flight, most, self._task.microbatches, trips_s, period_s, slack)

    def _room(self, stage: int, in_flight: Sequence[int]) -> int:
        """Return the most microbatches that a stage can hold, its machine's other stages as they are."""
        peer, saved = self._peers[stage], self._costs[stage].saved_bytes * MEMORY_MARGIN
        spare = self._task.member(peer).device.memory_bytes - self.needs_bytes(in_flight)[peer]
        # Stages that share a machine widen at the same time.
        spare /= self._peers.count(peer)
        return in_flight[stage] + (int(spare / saved) if saved and spare > 0 else 0)

    def needs_bytes(self, in_flight: Sequence[int]) -> dict[str, float]:
        """Return the memory that each machine must offer."""
        task, needs = self._task, dict.fromkeys(self._peers, 0.0)
        transient = dict.fromkeys(self._peers, 0)
        for cost, again, peer, count in zip(self._costs, self._again, self._peers, in_flight, strict=True):
            # One stage at a time computes, and a weight that two of them share is held once.
            transient[peer] = max(transient[peer], cost.transient_bytes)
            device = task.member(peer).device
            memory_bytes = training_memory_bytes(cost, device, count, task.optimizer_states)
            needs[peer] += memory_bytes - cost.transient_bytes
            needs[peer] -= (2 + task.optimizer_states) * again.trainable + again.other
        for peer in {peer for peer, again in zip(self._peers, self._again, strict=True) if again.trainable}:
            here = [stage for stage, each in enumerate(self._peers) if each == peer]
            needs[peer] += waiting_bytes([self._subdags[each] for each in here], [in_flight[each] for each in here])
        return {peer: (need + transient[peer]) * MEMORY_MARGIN for peer, need in needs.items()}

    def _commit_s(self) -> float:
        """Return the time between the last backward and the next step's first forward.

        Tied gradients are exchanged, every machine reports to the driver and hears from it, and applies the update.
        """
        task = self._task
        holders: dict[str, list[str]] = {}
        tied_bytes: dict[str, int] = {}
        for subdag, peer in zip(self._subdags, self._peers, strict=True):
            for weight in subdag.weights:
                if weight.trainable and peer not in holders.setdefault(weight.key, []):
                    holders[weight.key].append(peer)
                    tied_bytes[weight.key] = type_bytes(weight.type, task.sizes)
        exchange_s = max(
            (
                send_s(tied_bytes[key], link) + delay_s(link)
                for key, peers in holders.items()
                for one in peers
                for other in peers
                if one != other
                for link in (task.link(one, other),)
            ),
            default=0.0,
        )
        updates = dict.fromkeys(self._peers, 0.0)
        for seconds, peer in zip(self._update_s, self._peers, strict=True):
            updates[peer] += seconds
        slowest_s = max(task.link(task.owner.peer, peer).rtt_s + seconds for peer, seconds in updates.items())
        return exchange_s + slowest_s

    def _sending_s(self, stage: int) -> float:
        """Return the seconds for which a stage's sends of one microbatch occupy links."""
        outputs = sum(edge.forward_s for edge in self._edges if edge.source == stage)
        return outputs + sum(edge.backward_s or 0.0 for edge in self._edges if edge.target == stage)

    def evaluated(self, in_flight: Sequence[int], times: PipelineTimes) -> Evaluated:
        """Return the plan, what it needs, and who holds which weights."""
        holds: dict[str, set[WeightKey]] = {}
        for subdag, peer in zip(self._subdags, self._peers, strict=True):
            holds.setdefault(peer, set()).update(weight.key for weight in subdag.weights)
        return Evaluated(
            self.plan(in_flight, times),
            self.needs_bytes(in_flight),
            {peer: frozenset(keys) for peer, keys in holds.items()},
        )

    def plan(self, in_flight: Sequence[int], times: PipelineTimes) -> Plan:
        """Return the plan."""
        task = self._task
        commit_s = self._commit_s()
        step_s = times.makespan_s + commit_s
        stages = tuple(
            StagePlan(
                stage=stage,
                peer=self._peers[stage],
                start=start,
                stop=stop,
                in_flight=in_flight[stage],
                predicted=self._prediction(stage, self._costs[stage], in_flight[stage]),
            )
            for stage, (start, stop) in enumerate(pairwise(self._bounds))
        )
        bottleneck = self._bottleneck(times, commit_s, step_s)
        names = {peer: task.member(peer).name for peer in self._peers}
        offers = {peer: task.member(peer).device.memory_bytes for peer in self._peers}
        busy = {peer: seconds / step_s for peer, seconds in self._computing_s(times).items()}
        return Plan(
            graph_hash=task.graph_hash,
            sizes=task.sizes,
            microbatches=task.microbatches,
            privacy=task.privacy,
            owner=task.owner.peer,
            stages=stages,
            predicted_step_s=step_s,
            bottleneck=bottleneck,
            explanation=(
                *stage_lines(stages, task.graph.nodes, names, offers, busy),
                f"a step takes about {seconds_text(step_s)}; {bottleneck} limits it",
            ),
        )

    def _prediction(self, stage: int, cost: StageCost, in_flight: int) -> StagePrediction:
        task, (forward, backward) = self._task, self._seconds[stage]
        device = task.member(self._peers[stage]).device
        return StagePrediction(
            forward_s=forward,
            backward_s=backward,
            update_s=self._update_s[stage],
            memory_bytes=training_memory_bytes(cost, device, in_flight, task.optimizer_states),
            send_s=self._sending_s(stage),
        )

    def _computing_s(self, times: PipelineTimes) -> dict[str, float]:
        """Return the seconds of a step in which each machine computes: its passes, and the update once."""
        found = dict(times.busy_s)
        for peer, seconds in zip(self._peers, self._update_s, strict=True):
            found[peer] += seconds
        return found

    def _bottleneck(self, times: PipelineTimes, commit_s: float, step_s: float) -> str:
        """Name the machine, link or line that is busy most of a step, or its end if that takes longer."""
        task = self._task
        machine, machine_s = max(self._computing_s(times).items(), key=lambda item: item[1])
        words = f"computing on {task.member(machine).name}"
        if times.link_busy_s:
            (source, target), link_s = max(times.link_busy_s.items(), key=lambda item: item[1])
            if link_s > machine_s:
                words = f"the link from {task.member(source).name} to {task.member(target).name}"
                machine_s = link_s
        if times.line_busy_s:
            (machine, direction), line_s = max(times.line_busy_s.items(), key=lambda item: item[1])
            if line_s > machine_s:
                words, machine_s = f"the {direction}link of {task.member(machine).name}", line_s
        if commit_s > machine_s:
            words, machine_s = f"reporting to {task.owner.name} and updating, when all passes are done", commit_s
        return f"{words} (busy {machine_s / step_s:.0%} of it)"
