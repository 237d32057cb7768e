"""The routing simulator's entry: a job, who holds what, policies and rules in, a report out. Pure; chance by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from contenders.routed_simulation.deaths import Deaths
from contenders.routed_simulation.events import Events
from contenders.routed_simulation.gradient_cells import Cell
from contenders.routed_simulation.gradient_sums import Sums
from contenders.routed_simulation.machine_queues import Machine
from contenders.routed_simulation.recovery_rules import FUSION, RecoveryRules
from contenders.routed_simulation.routed_engine import Engine
from contenders.routed_simulation.routing_report import RoutedPass, RoutingReport
from contenders.routed_simulation.stage_holders import StageHolders
from contenders.routers.membership import Membership
from contenders.routers.route_policy import RoutePolicy
from contenders.routers.routed_job import RoutedJob
from fusionai.errors import ConfigError
from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.availability import Churn, Outage, Scripted
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.simulated_links import SimulatedLinks

DONE = "all steps are done"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingScenario:
    """What a job is simulated under. Raises ConfigError."""

    steps: int
    churn: Churn = field(default_factory=Scripted)
    rules: RecoveryRules = FUSION
    longest_s: float = 30 * 86400.0
    """Simulated time after which a job is given up."""
    record_steps: int = 0
    """Steps whose passes are in the report, from the first on."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if not self.longest_s > 0 or math.isnan(self.longest_s):
            raise ConfigError(f"longest_s must be above 0, got {self.longest_s}")


def links_of_job(job: RoutedJob) -> LinkRates:
    """Return the job's links, each by itself."""
    place = {peer: number for number, peer in enumerate(job.peers)}

    def link(source: str, target: str) -> LinkProfile:
        one, other = place[source], place[target]
        return LinkProfile(2 * float(job.delay_s[one, other]), float(job.bandwidth[one, other]))

    return LinkRates(link)


def simulate_routing(
    job: RoutedJob,
    holders: Sequence[Sequence[int]],
    policy: RoutePolicy,
    membership: Membership,
    scenario: RoutingScenario,
    *,
    links: LinkRates | None = None,
) -> RoutingReport:
    """Execute a job.

    Args:
        job: what passes, tensors and states take.
        holders: by stage, the machines that hold it at the start; the others are the pool.
        policy: routes microbatches; a fresh one for each run, since it learns.
        membership: decides who takes over and who moves; a fresh one for each run.
        scenario: steps, churn and rules of recovery.
        links: to simulate, where they differ from the job's: shared uplinks, say.

    Raises:
        ConfigError: a stage has no holder at the start, or one that cannot hold it.
    """
    return _RoutedRun(job, holders, policy, membership, scenario, links or links_of_job(job)).run()


class _RoutedRun:
    """One simulation."""

    def __init__(
        self,
        job: RoutedJob,
        holders: Sequence[Sequence[int]],
        policy: RoutePolicy,
        membership: Membership,
        scenario: RoutingScenario,
        links: LinkRates,
    ) -> None:
        _check(job, holders)
        self._job, self._scenario = job, scenario
        self._events = Events()
        self._channels = SimulatedLinks(links)
        self._engine = Engine(job, policy, self._events, self._channels)
        self._deaths = Deaths(self._engine, self._events, scenario.rules)
        self._sums = Sums(self._engine, self._events)
        self._stage_holders = StageHolders(
            self._engine, self._events, self._deaths, self._sums, membership, scenario.rules
        )
        self._engine.on_counted = self._deaths.on_waived = self._sums.check
        self._sums.on_committed = self._committed
        self._stage_holders.steps_since_snapshot = lambda: self._steps % scenario.rules.snapshot_steps
        self._stage_holders.usual_step_s = lambda: statistics.median(self._step_s) if self._step_s else 0.0
        self._stage_holders.on_roll_back = self._roll_back
        self._steps = self._rolled_back = self._dead = self._waived = 0
        self._ended = ""
        self._passes: list[RoutedPass] = []
        self._engine.on_pass = self._record if scenario.record_steps else None
        self._began_s = 0.0
        self._step_s: list[float] = []
        self._passes_s: list[float] = []
        for stage, machines in enumerate(holders):
            for machine in machines:
                self._stage_holders.seat(machine, stage)
        for machine, peer in enumerate(job.peers):
            self._next_outage(machine, scenario.churn.outages(peer))

    def run(self) -> RoutingReport:
        """Return the report."""
        self._begin()
        while not self._ended:
            if self._events.now_s > self._scenario.longest_s:
                self._ended = f"given up after {self._events.now_s:,.0f} s and {self._steps} steps: longest_s"
            elif not self._events.next():
                self._ended = self._stuck()
        engine = self._engine
        return RoutingReport(
            finished=self._ended == DONE,
            ended_because=self._ended,
            steps=self._steps,
            elapsed_s=self._events.now_s,
            step_s=tuple(self._step_s),
            passes_s=tuple(self._passes_s),
            deaths=self._dead,
            joined=self._stage_holders.joined,
            moved=self._stage_holders.moved,
            rolled_back=self._rolled_back,
            lost_cells=self._deaths.lost_cells,
            recomputed_s=engine.recomputed_s,
            waived=self._waived,
            busy_s={each.peer: each.busy_s for each in engine.machines if each.busy_s},
            sent_bytes=sum(each.sent_bytes for each in self._channels.take_traffic().values()),
            passes=tuple(self._passes),
        )

    def _begin(self) -> None:
        self._began_s = self._events.now_s
        self._sums.begin_step()
        self._engine.begin_step(self._steps)

    def _record(self, machine: Machine, cell: Cell, backward: bool) -> None:
        step, start_s, end_s = machine.running_step, machine.running_since_s, self._events.now_s
        if step < self._scenario.record_steps:
            self._passes.append(RoutedPass(step, cell.stage, machine.peer, backward, cell.microbatch, start_s, end_s))

    def _committed(self) -> None:
        now_s = self._events.now_s
        self._steps += 1
        self._step_s.append(now_s - self._began_s)
        self._passes_s.append(self._sums.summed_s - self._began_s)
        self._waived += len(self._engine.ledger.waived)
        if self._steps == self._scenario.steps:
            self._ended = DONE
            return
        self._engine.end_step()
        self._stage_holders.between_steps()
        self._begin()

    def _roll_back(self) -> None:
        undone = self._steps % self._scenario.rules.snapshot_steps
        self._steps -= undone
        self._rolled_back += undone
        self._engine.end_step()
        self._begin()

    def _next_outage(self, machine: int, outages: Iterator[Outage]) -> None:
        if (outage := next(outages, None)) is not None:
            self._events.at(outage.down_s, partial(self._down, machine, outage, outages))

    def _down(self, machine: int, outage: Outage, outages: Iterator[Outage]) -> None:
        peer = self._job.peers[machine]
        if machine == self._job.driver:
            self._ended = f"the driver's machine {peer} died at {self._events.now_s:,.1f} s; nobody can replace it"
            return
        self._dead += bool(self._engine.machines[machine].seats)
        self._stage_holders.down(machine)
        if outage.up_s < math.inf:
            self._events.at(outage.up_s, partial(self._up, machine, outages))

    def _up(self, machine: int, outages: Iterator[Outage]) -> None:
        self._stage_holders.up(machine)
        self._next_outage(machine, outages)

    def _stuck(self) -> str:
        unheld = self._stage_holders.unheld
        if unheld:
            return (
                f"stage {unheld[0]} has had no holder since its machines died, and no machine that could take it over "
                f"ever comes ({self._steps} steps are done)"
            )
        return f"nothing is left to do after {self._steps} steps, and the step is not over"


def _check(job: RoutedJob, holders: Sequence[Sequence[int]]) -> None:
    if len(holders) != job.stages:
        raise ConfigError(f"holders are given for {len(holders)} stages, but the job has {job.stages}")
    for stage, machines in enumerate(holders):
        if not machines:
            raise ConfigError(f"stage {stage} has no holder; name at least one machine for each stage")
        for machine in machines:
            if not job.possible(stage, machine):
                raise ConfigError(f"machine {job.peers[machine]!r} cannot hold stage {stage}: its memory is too small")
