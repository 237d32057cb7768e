"""Totals over all steps of a run, and the report made of them."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusionai.simulation.availability import OutageCalendar
from fusionai.simulation.prices import MachinePrice
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulated_links import LinkUse
from fusionai.simulation.simulation_report import FailureReport, LinkReport, MachineReport, PassReport, SimulationReport

_FREE = MachinePrice(0.0)


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What one step did, or the part of one that a restart cut off."""

    length_s: float
    passes_end_s: float
    """Seconds until the last backward."""
    pass_busy_s: dict[str, float]
    """By machine: passes only."""
    update_s: dict[str, float]
    traffic: dict[tuple[str, str], LinkUse]

    @property
    def computed_s(self) -> float:
        """Return the compute seconds of all machines."""
        return sum(self.pass_busy_s.values()) + sum(self.update_s.values())


class PassTime:
    """The time between steps' starts and their last backwards, in seconds of the run."""

    __slots__ = ("_before_s", "_starts_s", "_total_s")

    def __init__(self) -> None:
        self._starts_s: list[float] = []
        self._before_s: list[float] = []
        """Seconds of passes in the steps before each."""
        self._total_s = 0.0

    def add(self, start_s: float, passes_s: float) -> None:
        """Count the passes of a step that began at `start_s`, after all counted so far."""
        self._starts_s.append(start_s)
        self._before_s.append(self._total_s)
        self._total_s += passes_s

    def within(self, spans_s: Sequence[tuple[float, float]]) -> float:
        """Return how much of that time lies in spans of the run, from when to when each."""
        return sum(self._until(end_s) - self._until(start_s) for start_s, end_s in spans_s)

    def _until(self, now_s: float) -> float:
        place = bisect_right(self._starts_s, now_s) - 1
        if place < 0:
            return 0.0
        after_s = self._before_s[place + 1] if place + 1 < len(self._before_s) else self._total_s
        return min(self._before_s[place] + now_s - self._starts_s[place], after_s)


@dataclass(slots=True)
class Accounts:
    """What a run has done so far."""

    step_s: list[float] = field(default_factory=list)
    executed_steps: int = 0
    lost_s: float = 0.0
    recomputed_s: float = 0.0
    failures: list[FailureReport] = field(default_factory=list)
    timeline: list[PassReport] = field(default_factory=list)
    _tallies: list[tuple[StepTotals, int]] = field(default_factory=list)
    _passes: PassTime = field(default_factory=PassTime)
    _replayed_s: dict[str, float] = field(default_factory=dict)
    _outside: list[dict[tuple[str, str], LinkUse]] = field(default_factory=list)

    def add(self, tally: StepTotals, start_s: float, *, committed: bool) -> None:
        """Count a step that began at `start_s` of the run; the same tally again is the same step repeated."""
        self._passes.add(start_s, tally.passes_end_s)
        if self._tallies and self._tallies[-1][0] is tally:
            self._tallies[-1] = tally, self._tallies[-1][1] + 1
        else:
            self._tallies.append((tally, 1))
        if committed:
            self.step_s.append(tally.length_s)

    def replayed(self, machine: str, seconds: float) -> None:
        """Count a backup's computing of past steps."""
        self._replayed_s[machine] = self._replayed_s.get(machine, 0.0) + seconds
        self.recomputed_s += seconds

    def outside(self, traffic: dict[tuple[str, str], LinkUse]) -> None:
        """Count what was sent between steps."""
        self._outside.append(traffic)

    def report(
        self,
        scenario: Scenario,
        presence: OutageCalendar,
        *,
        peers: Sequence[str],
        microbatches: int,
        steps: int,
        elapsed_s: float,
        ended_because: str,
        snapshots: tuple[int, int],
    ) -> SimulationReport:
        """Return the report; `peers` are the plan's machines, `snapshots` those begun and those skipped."""
        busy_s = dict.fromkeys((*peers, *self._replayed_s), 0.0)
        pass_busy_s: dict[str, float] = {}
        links: dict[tuple[str, str], tuple[float, float]] = {}
        passes_s = steps_s = 0.0
        for tally, times in self._tallies:
            passes_s += times * tally.passes_end_s
            steps_s += times * tally.length_s
            for machine, seconds in tally.pass_busy_s.items():
                pass_busy_s[machine] = pass_busy_s.get(machine, 0.0) + times * seconds
                busy_s[machine] = busy_s.get(machine, 0.0) + times * seconds
            for machine, seconds in tally.update_s.items():
                busy_s[machine] = busy_s.get(machine, 0.0) + times * seconds
            _add(links, tally.traffic, times)
        for machine, seconds in self._replayed_s.items():
            busy_s[machine] += seconds
            pass_busy_s[machine] = pass_busy_s.get(machine, 0.0) + seconds
        for traffic in self._outside:
            _add(links, traffic, 1)
        sent, received = dict[str, float](), dict[str, float]()
        for (source, target), (size_bytes, _) in links.items():
            sent[source] = sent.get(source, 0.0) + size_bytes
            received[target] = received.get(target, 0.0) + size_bytes
        machines = []
        for peer, busy in busy_s.items():
            absent_s = presence.absent_s(peer, elapsed_s)
            there_s = max(0.0, elapsed_s - absent_s)
            price = scenario.prices.machines.get(peer, _FREE)
            idle_s = max(0.0, there_s - busy)
            there_in_passes_s = passes_s - self._passes.within(presence.gone(peer, elapsed_s))
            machines.append(
                MachineReport(
                    peer=peer,
                    busy_s=busy,
                    idle_s=idle_s,
                    absent_s=absent_s,
                    utilisation=busy / there_s if there_s else 0.0,
                    bubble=_idle_share(pass_busy_s.get(peer, 0.0), there_in_passes_s),
                    sent_bytes=sent.get(peer, 0.0),
                    received_bytes=received.get(peer, 0.0),
                    energy_j=price.power_w * (busy + scenario.prices.idle_share * idle_s),
                    rent_usd=price.rent_usd_per_hour * there_s / 3600,
                )
            )
        energy_j = sum(machine.energy_j for machine in machines)
        members = [machine for machine in machines if machine.peer in set(peers)]
        there_s = sum(machine.busy_s + machine.idle_s for machine in members)
        rate = steps * microbatches / elapsed_s if elapsed_s else 0.0
        tokens = scenario.tokens_per_microbatch
        return SimulationReport(
            finished=steps == scenario.steps,
            ended_because=ended_because,
            steps=steps,
            microbatches=microbatches,
            elapsed_s=elapsed_s,
            microbatches_per_s=rate,
            tokens_per_s=None if tokens is None else rate * tokens,
            step_s=tuple(self.step_s),
            median_step_s=statistics.median(self.step_s) if self.step_s else 0.0,
            p95_step_s=_p95(self.step_s),
            passes_share=passes_s / steps_s if steps_s else 0.0,
            utilisation=sum(machine.busy_s for machine in members) / there_s if there_s else 0.0,
            sent_bytes=sum(sent.values()),
            lost_s=self.lost_s,
            recomputed_s=self.recomputed_s,
            snapshots=snapshots[0],
            snapshots_skipped=snapshots[1],
            energy_j=energy_j,
            rent_usd=sum(machine.rent_usd for machine in machines),
            electricity_usd=energy_j / 3.6e6 * scenario.prices.usd_per_kwh,
            unpriced=tuple(machine.peer for machine in machines if machine.peer not in scenario.prices.machines),
            machines=tuple(machines),
            links=tuple(
                LinkReport(source=source, target=target, sent_bytes=size_bytes, busy_s=seconds)
                for (source, target), (size_bytes, seconds) in sorted(links.items())
            ),
            failures=tuple(self.failures),
            timeline=tuple(self.timeline),
            executed_steps=self.executed_steps,
        )


def _idle_share(busy_s: float, there_s: float) -> float:
    return max(0.0, 1 - busy_s / there_s) if there_s > 0 else 0.0


def _add(
    links: dict[tuple[str, str], tuple[float, float]], traffic: dict[tuple[str, str], LinkUse], times: int
) -> None:
    for key, each in traffic.items():
        size_bytes, seconds = links.get(key, (0.0, 0.0))
        links[key] = size_bytes + times * each.sent_bytes, seconds + times * each.busy_s


def _p95(values: Sequence[float]) -> float:
    """Return the smallest value that at least 95 % of all do not exceed."""
    return sorted(values)[-(-95 * len(values) // 100) - 1] if values else 0.0
