"""A job from its first step to its last, machines dying and taking over on the way.

Steps are transactions: each begins with all machines free and all links empty but for uploads, so a step that nothing
disturbs repeats the last such one. The time of a run is the sum of its steps and of what a restart adds in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from fusionai.simulation.accounts import Accounts, StepTotals
from fusionai.simulation.availability import OutageCalendar
from fusionai.simulation.backups import Backups
from fusionai.simulation.jitter import SpeedFactors
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.pass_executor import PassExecutor
from fusionai.simulation.placed_stages import PlacedStages
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulated_links import SimulatedLinks
from fusionai.simulation.simulated_recovery import Replay, Restart
from fusionai.simulation.simulation_report import FailureReport, PassReport, SimulationReport
from fusionai.simulation.snapshots import Snapshots, neighbours
from fusionai.simulation.sums_and_commit import SumsAndCommit, sums_and_commit
from fusionai.simulation.takeover import Takeover
from fusionai.simulation.workload import Workload

DONE = "all steps are done"


class _Stalled(Exception):
    """The job cannot go on; the text says why."""


class JobRun:
    """One simulation."""

    def __init__(
        self, workload: Workload, links: LinkRates, scenario: Scenario, offers_bytes: Mapping[str, int] | None = None
    ) -> None:
        """`offers_bytes`: memory of every machine known, by peer; those without a stage are the backup pool."""
        self._workload = workload
        self._scenario = scenario
        self._recovery = scenario.recovery
        self._channels = SimulatedLinks(links, may_be_cut=True)
        self._placed = PlacedStages(workload, self._channels, scenario.codec_of)
        self._presence = OutageCalendar(scenario.churn)
        self._backups = Backups(workload, self._presence, offers_bytes or {})
        self._snapshots = Snapshots(self._placed, workload.driver)
        known = (*(offers_bytes or {}), *workload.peers)
        self._factors = SpeedFactors(scenario.jitter, tuple(dict.fromkeys(known))) if scenario.jitter else None
        self._accounts = Accounts()
        self._now_s = 0.0
        self._step = 0
        self._computed_s: list[float] = []
        """Compute seconds of each finished step, which a restart loses."""
        self._restarts: list[int] = []
        """Failures whose interrupted step has not begun again, by their place; the latest is the earliest step's."""
        self._quiet: StepTotals | None = None
        """The last step that nothing disturbed, on the present machines."""

    def run(self) -> SimulationReport:
        """Return the report. Raises ValueError when a stage may hold no microbatch in flight."""
        scenario, ended = self._scenario, DONE
        try:
            while self._step < scenario.steps:
                if why := self._beyond_limits(self._now_s, 0):
                    raise _Stalled(why)
                self._note_restarted()
                self._snapshot()
                self._one_step()
        except _Stalled as stalled:
            ended = str(stalled)
        return self._accounts.report(
            scenario,
            self._presence,
            peers=self._workload.peers,
            microbatches=self._workload.microbatches,
            steps=self._step,
            elapsed_s=self._now_s,
            ended_because=ended,
            snapshots=(self._snapshots.begun, self._snapshots.skipped),
        )

    def _beyond_limits(self, now_s: float, open_failures: int) -> str:
        """Say why the job is given up at a time, or ""; `open_failures` are those of the present step."""
        failures = len(self._accounts.failures) + open_failures
        if now_s > self._scenario.longest_s:
            return f"given up after {now_s:,.0f} s and {self._step} steps: longest_s"
        if failures >= self._scenario.most_failures:
            return f"given up after {failures} failures and {self._step} steps: most_failures"
        return ""

    def _note_restarted(self) -> None:
        """Close the failures whose interrupted step begins again."""
        while self._restarts and self._accounts.failures[self._restarts[-1]].step <= self._step:
            place = self._restarts.pop()
            report = self._accounts.failures[place]
            self._accounts.failures[place] = msgspec.structs.replace(
                report, caught_up_s=self._now_s, recovery_s=self._now_s - report.died_s
            )

    def _snapshot(self) -> None:
        every = self._recovery.snapshot_steps
        if every is None or self._step == 0 or self._step % every:
            return
        placed = self._placed
        if isinstance(self._recovery, Replay):
            holders = neighbours(placed, self._recovery.holders, self._backups.spares(placed, self._now_s))
        else:
            holders = {stage.number: (self._workload.driver,) for stage in placed.stages}
        self._snapshots.begin(self._step, placed.stages, holders)

    def _deaths_s(self) -> dict[str, float]:
        """Return when machines that hold stages die, from the step's start; those that do not are left out."""
        found = {}
        for machine in {stage.machine: None for stage in self._placed.stages}:
            if (down_s := self._presence.next_down_s(machine, self._now_s)) < math.inf:
                found[machine] = down_s - self._now_s
        return found

    def _one_step(self) -> None:
        scenario = self._scenario
        deaths_s = self._deaths_s()
        record = self._step < scenario.timeline_steps
        quiet = scenario.repeat_equal_steps and self._factors is None and not self._channels.uploading
        first_s = min(deaths_s.values(), default=math.inf)
        if quiet and not record and self._quiet is not None and self._quiet.length_s <= first_s:
            self._finish(self._quiet)
            return
        factors = self._factors.next_step() if self._factors else {}
        if isinstance(self._recovery, Restart) and first_s < math.inf:
            # A death ends the step for everybody.
            until_s = {stage.machine: first_s for stage in self._placed.stages}
            executor = PassExecutor(self._placed, factors=factors, dies_s=until_s, record=record)
        else:
            executor = PassExecutor(self._placed, factors=factors, dies_s=deaths_s, record=record)
        self._accounts.executed_steps += 1
        failures: list[Takeover] = []
        while True:
            machine, death_s = min(deaths_s.items(), key=lambda item: (item[1], item[0]), default=("", math.inf))
            opened = min(failures, key=lambda failure: failure.next_s, default=None)
            next_s = opened.next_s if opened else math.inf
            if executor.run(until_s=min(death_s, next_s)):
                end = self._end(executor)
                if end.committed_s <= death_s:
                    break
            elif opened and next_s < death_s:
                opened.go_on(executor, self._placed, self._now_s)
                continue
            elif death_s == math.inf:
                raise ValueError("the pipeline cannot finish: a stage may hold nothing in flight (in_flight is 0)")
            if machine == self._workload.driver:
                self._give_up(executor, failures, death_s)
                raise _Stalled(f"the driver's machine {machine} died at {self._now_s:,.1f} s; nobody can replace it")
            if isinstance(self._recovery, Restart):
                self._restart(executor, machine, death_s)
                return
            if why := self._beyond_limits(self._now_s + death_s, len(failures)):
                # Backups may die faster than they catch up, and the step would never end.
                self._give_up(executor, failures, death_s)
                raise _Stalled(why)
            for failure in failures:
                failure.cut_short(machine, death_s)
            if not self._replace(self._recovery, executor, deaths_s, machine, death_s, failures):
                self._give_up(executor, failures, death_s)
                raise _Stalled(
                    f"{machine} died at {failures[-1].report.died_s:,.1f} s: {failures[-1].report.state_from}"
                )
        self._commit(executor, end, failures, repeatable=quiet and not failures)

    def _end(self, executor: PassExecutor) -> SumsAndCommit:
        return sums_and_commit(
            self._placed,
            self._workload.groups,
            self._workload.driver,
            free_s=executor.free_s,
            passes_end_s=executor.end_s,
            factors=executor.factors,
        )

    def _commit(
        self, executor: PassExecutor, end: SumsAndCommit, failures: list[Takeover], *, repeatable: bool
    ) -> None:
        for source, target, size_bytes in end.sends:
            self._channels.count(source, target, size_bytes)
        self._record(executor)
        self._accounts.lost_s += executor.lost_s
        self._accounts.recomputed_s += executor.again_s
        self._close(failures)
        self._snapshots.settle(end.committed_s)
        traffic = self._channels.end_step(end.committed_s)
        tally = StepTotals(end.committed_s, executor.end_s, executor.busy_s, end.update_s, traffic)
        self._quiet = tally if repeatable else None if failures else self._quiet
        self._finish(tally)

    def _close(self, failures: list[Takeover]) -> None:
        """Report the failures of a step that is over."""
        for failure in failures:
            caught_up_s = self._now_s + max(stage.caught_up_s for stage in failure.stages)
            report = failure.report
            if caught_up_s < math.inf:
                recovery_s = caught_up_s - report.died_s
                report = msgspec.structs.replace(report, caught_up_s=caught_up_s, recovery_s=recovery_s)
            self._accounts.failures.append(report)
            if failure.replay_compute_s:
                self._accounts.replayed(failure.backup, failure.replay_compute_s)

    def _finish(self, tally: StepTotals) -> None:
        self._accounts.add(tally, self._now_s, committed=True)
        self._computed_s.append(tally.computed_s)
        self._now_s += tally.length_s
        self._step += 1

    def _cut_off(self, executor: PassExecutor, at_s: float) -> None:
        """End a step without committing it."""
        self._record(executor)
        self._snapshots.settle(at_s)
        traffic = self._channels.end_step(at_s)
        tally = StepTotals(at_s, min(at_s, executor.end_s), executor.busy_s, {}, traffic)
        self._accounts.lost_s += tally.computed_s
        self._accounts.add(tally, self._now_s, committed=False)
        self._now_s += at_s

    def _give_up(self, executor: PassExecutor, failures: list[Takeover], at_s: float) -> None:
        """End the run in the middle of a step; passes that had begun elsewhere end."""
        self._close(failures)
        self._cut_off(executor, max(at_s, executor.end_s))

    def _record(self, executor: PassExecutor) -> None:
        self._accounts.timeline += [
            PassReport(
                step=self._step,
                pipeline=each.pipeline,
                stage=each.stage,
                peer=each.machine,
                direction="backward" if each.backward else "forward",
                microbatch=each.microbatch,
                start_s=self._now_s + each.start_s,
                end_s=self._now_s + each.end_s,
                again=each.again,
                lost=each.lost,
            )
            for each in executor.passes or ()
        ]

    def _replace(
        self,
        recovery: Replay,
        executor: PassExecutor,
        deaths_s: dict[str, float],
        machine: str,
        death_s: float,
        failures: list[Takeover],
    ) -> bool:
        """Let a backup take a dead machine's stages, in the middle of the step; return whether one can.

        The failure is added to `failures` either way.
        """
        died_s = self._now_s + death_s
        known_s = died_s + recovery.detection_s
        placed = self._placed
        lost = executor.lose(machine)
        self._snapshots.lose_sender(machine, death_s)
        self._channels.lose(machine, death_s)
        executor.look_again(death_s)
        for failure in failures:
            failure.look_again(death_s)
        report = FailureReport(
            peer=machine,
            step=self._step,
            died_s=died_s,
            detected_s=known_s,
            backup=None,
            state_from="",
            restored_s=None,
            replayed_steps=0,
            caught_up_s=None,
            recovery_s=None,
        )
        backup = self._backups.choose(placed, lost, known_s)
        sources = [
            self._backups.state_of(
                placed, stage, self._snapshots, self._step, died_s=died_s, known_s=known_s, step_start_s=self._now_s
            )
            for stage in lost
        ]
        begin_s = max(known_s, backup.from_s if backup else math.inf, *(source.from_s for source in sources))
        if backup is None or begin_s == math.inf:
            why = (
                "nobody with its state ever comes"
                if backup
                else "no machine that could take its stages over ever comes"
            )
            report = msgspec.structs.replace(report, state_from=why)
            failures.append(Takeover(report, lost, machine, (), math.inf))
            return False
        for stage, load in zip(lost, backup.loads, strict=True):
            placed.move(stage, load)
            stage.factor = executor.factors.get(load.peer, 1.0)
        del deaths_s[machine]
        executor.dies_s.pop(machine, None)
        next_s = self._presence.next_down_s(backup.peer, begin_s)
        if next_s < math.inf:
            deaths_s[backup.peer] = executor.dies_s[backup.peer] = next_s - self._now_s
        report = msgspec.structs.replace(
            report,
            backup=backup.peer,
            state_from="; ".join(dict.fromkeys(source.words for source in sources)),
            replayed_steps=self._step - min(source.step for source in sources),
        )
        failures.append(Takeover(report, lost, backup.peer, sources, begin_s - self._now_s))
        return True

    def _restart(self, executor: PassExecutor, machine: str, death_s: float) -> None:
        """Throw everything since the last checkpoint away and begin again from there."""
        assert isinstance(self._recovery, Restart)
        died_s = self._now_s + death_s
        known_s = died_s + self._recovery.detection_s
        interrupted = self._step
        lost = self._placed.held_by(machine)
        backup = self._backups.choose(self._placed, lost, known_s)
        self._snapshots.lose_sender(machine, death_s)
        self._channels.lose(machine, death_s)
        self._cut_off(executor, death_s)
        checkpoint = self._snapshots.whole_step
        report = FailureReport(
            peer=machine,
            step=interrupted,
            died_s=died_s,
            detected_s=known_s,
            backup=backup.peer if backup else None,
            state_from=f"the checkpoint after step {checkpoint}" if checkpoint else "the initial state",
            restored_s=None,
            replayed_steps=interrupted - checkpoint,
            caught_up_s=None,
            recovery_s=None,
        )
        if backup is None:
            self._accounts.failures.append(report)
            raise _Stalled(f"{machine} died at {died_s:,.1f} s and no machine that could take its stages ever comes")
        for stage, load in zip(lost, backup.loads, strict=True):
            self._placed.move(stage, load)
        state_bytes: dict[str, float] = {}
        for stage in self._placed.stages:
            state_bytes[stage.machine] = state_bytes.get(stage.machine, 0.0) + stage.load.state_bytes
        loading_s = max(
            self._channels.send_state(self._workload.driver, peer, size_bytes, 0.0)
            for peer, size_bytes in state_bytes.items()
        )
        self._accounts.outside(self._channels.end_step(loading_s))
        undone_s = sum(self._computed_s[checkpoint:])
        self._accounts.lost_s += undone_s
        del self._computed_s[checkpoint:]
        self._step = checkpoint
        self._now_s = max(known_s, backup.from_s) + self._recovery.restart_s + loading_s
        self._quiet = None
        self._restarts.append(len(self._accounts.failures))
        self._accounts.failures.append(msgspec.structs.replace(report, restored_s=self._now_s))
