"""A chain worked through as a 1F1B schedule: its real stages are costed, and each pass starts when it can.

Where several pipelines share the owner's machine, each is reckoned with its part of it: passes and transfers there take
longer by the inverse of the pipeline's share of the microbatches. That conserves the owner's capacity and errs on the
slow side while the others are idle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fusionai.graph.cost import StageCost
from fusionai.scheduling.estimator import backward_s, deferred_s, forward_s, training_memory_bytes
from fusionai.scheduling.in_flight import SLACKS, WORTH_MEMORY, busiest_s, least_held, round_trips_s, widened
from fusionai.scheduling.pipeline import (
    Edge,
    PipelineTimes,
    StageTimes,
    executed_microbatches,
    executed_round,
)
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.swarm.chain import Chain
from fusionai.scheduling.swarm.work import Work

_NEVER = PipelineTimes(math.inf, {}, {}, {})


@dataclass(frozen=True, slots=True)
class Running:
    """A pipeline with its schedule. Stages are in order, the owner's among them."""

    chain: Chain
    microbatches: int
    machines: tuple[int, ...]
    """By stage."""
    nodes: tuple[int, ...]
    """Stage k is nodes [nodes[k], nodes[k + 1])."""
    costs: tuple[StageCost, ...]
    seconds: tuple[tuple[float, float], ...]
    """Forward and backward of a microbatch, by stage, nobody else on the machine."""
    send_s: tuple[float, ...]
    """For which a stage's sends of one microbatch occupy links."""
    in_flight: tuple[int, ...]
    times: PipelineTimes
    needs_bytes: tuple[float, ...]
    """By stage, with the margin of estimates."""

    @property
    def possible(self) -> bool:
        """Whether its machines can hold their stages and be linked; of the owner's memory others decide."""
        return math.isfinite(self.times.makespan_s)


def run(work: Work, chain: Chain, microbatches: int) -> Running:
    """Work a chain's schedule through.

    Stages hold as many microbatches as 1F1B asks for, or as their machines have room for; where links are slow they
    hold more, as far as memory goes and the pipeline becomes faster. A chain that does not fit takes infinitely long.
    """
    stages = _Stages(work, chain, microbatches)
    most = stages.most_in_flight()
    limit = min(chain.in_flight_limit, microbatches)
    chosen, times = least_held(most, limit), _NEVER
    if min(most) > 0:
        times = stages.times(chosen)
        for slack in SLACKS:
            if stages.ideal_s() >= WORTH_MEMORY * times.makespan_s:
                break
            wider = stages.wider(chosen, most, limit, slack)
            if wider != chosen and (tried := stages.times(wider)).makespan_s < WORTH_MEMORY * times.makespan_s:
                chosen, times = wider, tried
    return stages.running(chosen, times)


class _Stages:
    """The stages of one chain and what joins them."""

    def __init__(self, work: Work, chain: Chain, microbatches: int) -> None:
        task, segments = work.task, work.segments
        self._work, self._chain, self._microbatches = work, chain, microbatches
        self._sharing = task.microbatches / microbatches
        owner = task.owner_index if task.owner_index is not None else -1
        self._before, after = work.before, segments.outer_after
        self.machines = (*[owner] * self._before, *chain.machines, *[owner] * after)
        ends = [work.positions[bound] for bound in chain.bounds]
        self._nodes = (*[0] * self._before, *ends, *[len(task.graph.nodes)] * after)
        inner = work.chain_costs(chain.bounds)
        self._costs = (*segments.outer[: self._before], *inner, *segments.outer[self._before :])
        devices = [task.machines[machine].device for machine in self.machines]
        precision = task.precision
        self._seconds = tuple(
            (forward_s(cost, device, precision), backward_s(cost, device, precision))
            for cost, device in zip(self._costs, devices, strict=True)
        )
        self._deferred_s = [
            min(seconds[1], deferred_s(cost, device, precision))
            for cost, device, seconds in zip(self._costs, devices, self._seconds, strict=True)
        ]
        self._factors = [self._sharing if machine == owner else 1.0 for machine in self.machines]
        self._edges = self._make_edges(owner)

    def _make_edges(self, owner: int) -> list[Edge]:
        work, task = self._work, self._work.task
        stage_of = [0] * self._before
        for stage, (start, stop) in enumerate(zip(self._chain.bounds, self._chain.bounds[1:], strict=False)):
            stage_of += [stage + self._before] * (stop - start)
        stage_of += [len(self.machines) - 1] * work.segments.outer_after
        sent: dict[tuple[str, int, int], tuple[int, bool]] = {}
        for each in work.crossings:
            source, target = stage_of[each.maker], stage_of[each.taker]
            if source != target:
                sent[each.value, source, target] = each.size_bytes, each.gradient
        totals: dict[tuple[int, int], tuple[int, int]] = {}
        for (_, source, target), (size, gradient) in sent.items():
            forward, back = totals.get((source, target), (0, 0))
            totals[source, target] = forward + size, back + (size if gradient else 0)
        edges = []
        for (source, target), (forward, back) in totals.items():
            one, other = self.machines[source], self.machines[target]
            slower = self._sharing if owner in (one, other) else 1.0
            out, home = float(task.bandwidths(one, other)), float(task.bandwidths(other, one))
            delay = float(task.delays(one, other))
            if out == 0 or home == 0:
                edges.append(Edge(source, target, math.inf, math.inf, delay))
                continue
            back_s = slower * back / home if back else None
            out_lines_s, home_lines_s = (
                self._lines_s(slower * forward, one, other),
                self._lines_s(slower * back, other, one),
            )
            edges.append(Edge(source, target, slower * forward / out, back_s, delay, out_lines_s, home_lines_s))
        return edges

    def _lines_s(self, size_bytes: float, source: int, target: int) -> tuple[float, float]:
        """Return the seconds that bytes take the source's uplink and the target's downlink."""
        lines = self._work.task.lines
        if lines is None or source == target:
            return 0.0, 0.0
        return float(size_bytes / lines[0][source]), float(size_bytes / lines[1][target])

    def times(self, in_flight: Sequence[int]) -> PipelineTimes:
        if any(math.isinf(edge.forward_s) for edge in self._edges):
            return _NEVER
        if len(self.machines) == 1:
            (forward, backward), machine = self._seconds[0], str(self.machines[0])
            whole = self._microbatches * (forward + backward)
            return PipelineTimes(whole, {machine: whole}, {}, {})
        stages = self._stage_times(in_flight)
        executed = executed_microbatches(stages, self._microbatches)
        key = (stages, tuple(self._edges), executed, executed == self._microbatches)
        if (round_ := self._work.schedules.get(key)) is None:
            round_ = self._work.schedules[key] = executed_round(stages, self._edges, self._microbatches)
        found = round_.times(self._microbatches)
        back = {name: str(machine) for machine, name in self._names().items()}
        return PipelineTimes(
            found.makespan_s,
            {back[name]: seconds for name, seconds in found.busy_s.items()},
            {(back[one], back[other]): seconds for (one, other), seconds in found.link_busy_s.items()},
            {(back[machine], direction): seconds for (machine, direction), seconds in found.line_busy_s.items()},
        )

    def _stage_times(self, in_flight: Sequence[int]) -> tuple[StageTimes, ...]:
        # Machines by their place, so that like pipelines are worked through once.
        names = self._names()
        return tuple(
            StageTimes(names[machine], factor * forward, factor * backward, held, factor * deferred)
            for machine, factor, (forward, backward), held, deferred in zip(
                self.machines, self._factors, self._seconds, in_flight, self._deferred_s, strict=True
            )
        )

    def _names(self) -> dict[int, str]:
        return {machine: str(place) for place, machine in enumerate(dict.fromkeys(self.machines))}

    def ideal_s(self) -> float:
        """Return what an ideal pipeline takes, in which nothing waits but for what is busiest."""
        stages = self._stage_times([1] * len(self.machines))
        trips_s, period_s = round_trips_s(stages, self._edges), busiest_s(stages, self._edges)
        return max(trips_s) + (self._microbatches - 1) * period_s

    def wider(self, in_flight: Sequence[int], most: Sequence[int], limit: int, slack: float) -> tuple[int, ...]:
        """Return how many each stage must hold to be busy while a microbatch is on its way there and back."""
        stages = self._stage_times(in_flight)
        trips_s, period_s = round_trips_s(stages, self._edges), busiest_s(stages, self._edges)
        return widened(in_flight, most, limit, trips_s, period_s, slack)

    def most_in_flight(self) -> tuple[int, ...]:
        """Return, by stage, how many microbatches its machine has room for; the owner's stages share what it has.

        Whether the owner's machine holds its stages depends on the other pipelines: of those it is at least what 1F1B
        asks for.
        """
        task, found = self._work.task, []
        for stage, machine in enumerate(self.machines):
            device = task.machines[machine].device
            users = self.machines.count(machine) * self._factors[stage]
            saved = self._costs[stage].saved_bytes * MEMORY_MARGIN
            spare = device.memory_bytes / users - self._need_bytes(stage, 0)
            room = 0 if spare < 0 else min(self._microbatches, int(spare / saved) if saved else self._microbatches)
            found.append(max(room, len(self.machines) - stage) if machine == task.owner_index else room)
        return tuple(found)

    def _need_bytes(self, stage: int, held: int) -> float:
        task = self._work.task
        device = task.machines[self.machines[stage]].device
        return training_memory_bytes(self._costs[stage], device, held, task.optimizer_states) * MEMORY_MARGIN

    def running(self, in_flight: tuple[int, ...], times: PipelineTimes) -> Running:
        sends = [0.0] * len(self.machines)
        for edge in self._edges:
            sends[edge.source] += edge.forward_s
            sends[edge.target] += edge.backward_s or 0.0
        return Running(
            chain=self._chain,
            microbatches=self._microbatches,
            machines=self.machines,
            nodes=self._nodes,
            costs=self._costs,
            seconds=self._seconds,
            send_s=tuple(sends),
            in_flight=in_flight,
            times=times,
            needs_bytes=tuple(self._need_bytes(stage, held) for stage, held in enumerate(in_flight)),
        )
