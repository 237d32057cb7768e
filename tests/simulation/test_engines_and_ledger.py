"""Both engines run the schedule of the runtime: at every moment its ledger would choose the pass that they start.

`scheduling.pipeline` executes a step to plan it, `simulation.pass_executor` to simulate it under faults. Here the real
`RoundLedger` of each machine is given an engine's arrivals and ends of passes in the order of time. Whenever a machine
is free, its ledger must offer the pass that the engine starts at that time, and none if the engine starts none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionai.graph.model import SubDag, TensorType, Transfer, ValueName
from fusionai.scheduling.pipeline import Edge, StageTimes, _Run
from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.codecs import Dense
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.pass_executor import PassExecutor
from fusionai.simulation.placed_stages import PlacedStages
from fusionai.simulation.simulated_links import SimulatedLinks
from fusionai.simulation.workload import EdgeLoad, PipelineLoad, StageLoad, Workload, unchanged
from fusionai.tensor import TensorData
from fusionai.training.ledger import ReadyPass, RoundLedger, Slot

SCALAR = TensorType("float32", ())
TENSOR = TensorData("float32", (), bytes(4))

Key = tuple[int, bool, int]
"""A pass: stage, whether it is a backward, microbatch."""


@dataclass
class Machine:
    """What an engine says that one machine did, from `from_s` on until it died."""

    stages: list[int]
    from_s: float = 0.0
    until_s: float = math.inf
    starts: dict[float, Key] = field(default_factory=dict)
    ends: dict[float, Key] = field(default_factory=dict)
    arrivals: dict[float, list[Slot]] = field(default_factory=lambda: defaultdict(list))

    def ran(self, key: Key, start_s: float, end_s: float, *, lost: bool = False) -> None:
        self.starts[start_s] = key
        if not lost:
            self.ends[end_s] = key

    def received(self, edge: Edge, index: int, backward: bool, at_s: float) -> None:
        stage, peer_stage = (edge.source, edge.target) if backward else (edge.target, edge.source)
        self.arrivals[at_s].append(Slot(stage, index, value_of(edge), backward, peer_stage))


@dataclass(frozen=True)
class Case:
    """One pipeline. Links carry one byte a second, so bytes of an edge are seconds."""

    stages: tuple[StageTimes, ...]
    edges: tuple[Edge, ...]
    microbatches: int

    @property
    def machines(self) -> list[str]:
        return list(dict.fromkeys(stage.machine for stage in self.stages))

    def held_by(self, machine: str) -> list[int]:
        return [place for place, stage in enumerate(self.stages) if stage.machine == machine]


def value_of(edge: Edge) -> ValueName:
    return ValueName(f"from {edge.source} to {edge.target}")


def subdag(case: Case, stage: int) -> SubDag:
    """A sub-DAG without operators: the ledger looks at its edges only."""

    def transfers(edges: Iterable[Edge]) -> tuple[Transfer, ...]:
        return tuple(
            Transfer(value_of(each), each.source, each.target, SCALAR, each.backward_s is not None) for each in edges
        )

    return SubDag(
        index=stage,
        symbols={},
        inputs=(),
        weights=(),
        nodes=(),
        types={},
        receives=transfers(each for each in case.edges if each.target == stage),
        sends=transfers(each for each in case.edges if each.source == stage),
        loss=None,
    )


def check(case: Case, machine: Machine) -> None:
    """Drive a machine's ledger with an engine's times."""
    in_flight = {stage: case.stages[stage].in_flight for stage in machine.stages}
    subdags = [subdag(case, stage) for stage in machine.stages]
    ledger = RoundLedger(subdags, case.microbatches, in_flight, train=True)
    running: ReadyPass | None = None
    times = sorted({machine.from_s, *machine.starts, *machine.ends, *machine.arrivals})
    for now_s in times:
        if not machine.from_s <= now_s < machine.until_s:
            continue
        for slot in machine.arrivals.get(now_s, ()):
            assert ledger.deliver(slot, TENSOR)
        if now_s in machine.ends:
            assert running is not None
            ledger.finish(running)
            running = None
        if running is None:
            running = ledger.take()
            chosen = running and (running.stage, running.turn.direction == "backward", running.turn.index)
            assert chosen == machine.starts.get(now_s), f"at {now_s}"
        else:
            assert now_s not in machine.starts
    assert ledger.complete or machine.until_s < math.inf


class RecordedRun(_Run):
    """The planning engine, noting its passes and arrivals."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.stages, case.edges, case.microbatches)
        self.case = case
        self.found = {machine: Machine(case.held_by(machine)) for machine in case.machines}

    def _pass(self, stage: int, start_s: float, backward: bool) -> None:
        index = (self.backwards if backward else self.forwards)[stage]
        super()._pass(stage, start_s, backward)
        name = self.case.stages[stage].machine
        self.found[name].ran((stage, backward, index), start_s, self.free_s[self.machine[stage]])
        for edge in self.case.edges:
            other = edge.source if backward else edge.target
            if stage == (edge.target if backward else edge.source) and not (backward and edge.backward_s is None):
                # When the last of a pass's tensors so far arrives; which of them it is makes no difference to it.
                at_s = self.ready_s[backward][other][index]
                self.found[self.case.stages[other].machine].received(edge, index, backward, at_s)


def workload_of(case: Case) -> Workload:
    loads = tuple(
        StageLoad(
            peer=each.machine,
            forward_s=each.forward_s,
            backward_s=each.backward_s,
            in_flight=each.in_flight,
            deferred_s=each.deferred_s,
        )
        for each in case.stages
    )
    edges = tuple(EdgeLoad(each.source, each.target, each.forward_s, each.backward_s) for each in case.edges)
    return Workload((PipelineLoad(loads, edges, case.microbatches),), driver="elsewhere")


def executor_of(
    case: Case, delay_s: float, *, shared: bool, dies_s: dict[str, float] | None = None
) -> tuple[PassExecutor, PlacedStages]:
    lines = dict.fromkeys(case.machines, 1.0) if shared else {}
    channels = SimulatedLinks(
        LinkRates(lambda one, other: LinkProfile(2 * delay_s, 1.0), lines, lines), may_be_cut=True
    )
    assembly = PlacedStages(workload_of(case), channels, lambda one, other: Dense())
    return PassExecutor(assembly, dies_s=dies_s, record=True), assembly


def note_passes(executor: PassExecutor, found: dict[str, Machine]) -> None:
    for each in executor.passes or ():
        key = each.stage, each.backward, each.microbatch
        found[each.machine].ran(key, each.start_s, each.end_s, lost=each.lost)


def note_arrivals(case: Case, assembly: PlacedStages, found: dict[str, Machine], of: Sequence[str]) -> None:
    edges = {(edge.source, edge.target): edge for edge in case.edges}
    for lane in assembly.lanes:
        pair = lane.source.stage, lane.target.stage
        if lane.target.machine in of:
            for index, at_s in enumerate(lane.arrival_s):
                if at_s < math.inf:
                    edge = edges[pair[::-1] if lane.backward else pair]
                    found[lane.target.machine].received(edge, index, lane.backward, at_s)


SECONDS = st.one_of(st.integers(1, 4).map(float), st.floats(0.1, 4.0))
"""Whole numbers make many things happen at the same time."""


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, float]:
    """A pipeline of 1 to 5 stages, some of them on the machine of an owner, and the latency of all links."""
    count = draw(st.integers(1, 5))
    machines = [f"m{place}" for place in range(count)]
    if count > 1 and draw(st.booleans()):
        machines[0] = machines[-1] = "owner"
    stages = []
    for machine in machines:
        backward_s = draw(SECONDS)
        deferred_s = draw(st.sampled_from((0.0, 0.5, 0.75))) * backward_s
        stages.append(StageTimes(machine, draw(SECONDS), backward_s, draw(st.integers(1, 6)), deferred_s))
    delay_s = draw(st.sampled_from((0.0, 0.25, 1.0)))
    pairs = [(place, place + 1) for place in range(count - 1)]
    if count > 2 and draw(st.booleans()):
        pairs.append((0, count - 1))
    sizes = st.one_of(st.just(0.0), SECONDS)
    edges = [
        Edge(one, other, draw(sizes), draw(sizes) if other == one + 1 or draw(st.booleans()) else None, delay_s)
        for one, other in pairs
    ]
    return Case(tuple(stages), tuple(edges), draw(st.integers(1, 8))), delay_s


@settings(max_examples=300, deadline=None)
@given(cases())
def test_planning(given_case: tuple[Case, float]) -> None:
    case, _ = given_case
    run = RecordedRun(case)
    run.finished()
    for machine in run.found.values():
        check(case, machine)


@settings(max_examples=300, deadline=None)
@given(cases(), st.booleans())
def test_simulating(given_case: tuple[Case, float], shared: bool) -> None:
    case, delay_s = given_case
    executor, assembly = executor_of(case, delay_s, shared=shared)
    assert executor.run()
    found = {machine: Machine(case.held_by(machine)) for machine in case.machines}
    note_passes(executor, found)
    note_arrivals(case, assembly, found, case.machines)
    for machine in found.values():
        check(case, machine)


@settings(max_examples=300, deadline=None)
@given(cases(), st.booleans(), st.integers(0, 4), st.floats(0.0, 30.0), st.floats(0.0, 5.0))
def test_simulating_a_death(
    given_case: tuple[Case, float], shared: bool, place: int, dies_s: float, restored_after_s: float
) -> None:
    """A machine dies and another takes its stages: the dead one's ledger holds until then, the other's from then on."""
    case, delay_s = given_case
    dead = case.stages[place % len(case.stages)].machine
    executor, assembly = executor_of(case, delay_s, shared=shared, dies_s={dead: dies_s})
    if executor.run(until_s=dies_s):
        return
    held = case.held_by(dead)
    found = {machine: Machine(case.held_by(machine)) for machine in case.machines}
    found[dead].until_s = dies_s
    note_arrivals(case, assembly, found, [dead])
    for stage in executor.lose(dead):
        assembly.move(stage, unchanged(stage.load, "backup"))
    executor.look_again(dies_s)
    from_s = dies_s + restored_after_s
    executor.run(until_s=from_s)
    for stage in assembly.held_by("backup"):
        executor.restore(stage, from_s)
    assert executor.run()
    found["backup"] = Machine(held, from_s=from_s)
    note_passes(executor, found)
    note_arrivals(case, assembly, found, [machine for machine in found if machine != dead])
    for machine in found.values():
        check(case, machine)


def test_another_choice_is_noticed() -> None:
    """The check itself: a ledger whose machine starts a pass late, or another one, disagrees."""
    case = Case((StageTimes("m", 1.0, 1.0, 2),), (), 2)
    late, other = Machine([0]), Machine([0])
    late.ran((0, False, 0), 0.5, 1.5)
    other.ran((0, False, 1), 0.0, 1.0)
    for machine in (late, other):
        with pytest.raises(AssertionError):
            check(case, machine)
