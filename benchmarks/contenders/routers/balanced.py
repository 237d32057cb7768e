"""Who holds which stage, by the estimated step: FusionAI's way.

A stage that lost its holders goes to whoever makes the next steps shortest: a machine of the pool, or one that holds
another stage and has the memory for a second. So a fast cluster that is one machine short goes on at a part of its
speed, instead of sending every tensor out and back over slow links. Who comes back relieves whoever does two stages'
work or computes behind a slow link, in the middle of a step if waiting for its end would take longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from contenders.routers.membership import Membership, Placement, Staffing
from contenders.routers.routed_job import RoutedJob, ring_of
from contenders.routers.step_estimate import seats_of, step_estimate

_SHARE_OF_SUMS = 0.1
"""Of the seconds of all sums, added to the step where changes are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedConfig:
    """When a change of who holds what is worth it."""

    least_gain: float = 0.15
    """Share of a step that a change must save: estimates err by about as much (docs/routing.md)."""
    snapshot_steps: int = 5
    """Steps between snapshots: half of them are lost where the only holder of a stage dies. A second holder may cost
    what that loses on average, by the deaths seen so far."""
    replays: bool = True
    """Whether a machine may load a stage from a snapshot and compute the steps since again, where the holder's link is
    slower than that."""
    moving_steps: float = 10.0
    """Steps in which a change must earn the time of its state's transfer."""
    most_moves: int = 3
    """Changes between two steps."""


@dataclass(frozen=True, slots=True)
class _Seating:
    """Who holds which stage, and who is spare."""

    holders: tuple[tuple[int, ...], ...]
    spare: tuple[int, ...]

    @property
    def known(self) -> set[int]:
        """Return all machines."""
        return {machine for machines in self.holders for machine in machines} | set(self.spare)

    def after(self, machine: int, changes: Mapping[int, list[int]]) -> _Seating:
        """Return it with a machine no longer spare, and other holders of some stages."""
        holders = tuple(
            tuple(sorted(changes[stage])) if stage in changes else each for stage, each in enumerate(self.holders)
        )
        return _Seating(holders, tuple(each for each in self.spare if each != machine))


@dataclass(frozen=True, slots=True)
class _Change:
    """One change of who holds what."""

    placement: Placement
    after: _Seating
    transfer_s: float
    """Of loading state."""


class BalancedMembership(Membership):
    """Compares single changes by the step that they give, sums of gradients and links included.

    Stages without a holder come first. Then spares are added or take somebody's place, one after the other, where the
    estimated step becomes shorter, and where a stage has one holder only, if a second costs little. Who would slow the
    sum of gradients down stays in the pool. Between steps, holders change places where that pays.
    """

    def __init__(self, job: RoutedJob, config: BalancedConfig | None = None) -> None:
        self._job, self._config = job, config or BalancedConfig()
        self._settled: _Seating | None = None
        """For which no move pays."""
        self._complete: _Seating | None = None
        """Which no spare machine makes faster."""

    def placements(self, view: Staffing) -> tuple[Placement, ...]:
        """Fill empty stages, then let in whoever shortens the step."""
        now = _Seating(view.holders, view.spare)
        found: list[Placement] = []
        for stage in range(self._job.stages):
            if now.holders[stage] or stage in self._job.pinned:
                continue
            if takers := list(self._takers(stage, now)):
                best = min(takers, key=lambda each: (self._taking_over_s(each, stage), each.placement.machine))
                found.append(best.placement)
                now = best.after
        while now.spare and all(now.holders):
            chosen = self._faster(now) or self._safer(now, view)
            if chosen is None:
                break
            found.append(chosen.placement)
            now = chosen.after
        return tuple(found)

    def moves(self, view: Staffing) -> tuple[Placement, ...]:
        """Return the changes that shorten the step, together, while they pay for their transfers.

        A holder changes its stage, gives it to a machine of the pool or to another holder, or leaves for the pool.
        Where two machines hold the step up, relieving one alone saves nothing, so changes are looked at together.
        """
        began = now = _Seating(view.holders, view.spare)
        if not all(now.holders) or now == self._settled:
            return ()
        tried: list[Placement] = []
        busy: set[int | None] = set()
        """Who changes already: that happens once, and those who leave load nothing now."""
        worth = 0
        transfers_s = 0.0
        kept_s = now_s = self._score_s(now)
        while len(tried) < self._config.most_moves:
            best: tuple[float, float, _Change] | None = None
            for change in self._changes(now):
                if change.placement.machine in busy or change.placement.replaces in busy:
                    continue
                step_s = self._score_s(change.after)
                cost_s = step_s + change.transfer_s / self._config.moving_steps
                if math.isfinite(cost_s) and (best is None or cost_s < best[0]):
                    best = cost_s, step_s, change
            if best is None or best[1] >= now_s:
                break
            _, now_s, change = best
            now = change.after
            tried.append(change.placement)
            busy |= {change.placement.machine, change.placement.replaces} - {None}
            transfers_s += change.transfer_s
            gain_s = kept_s - now_s
            if now_s < kept_s * (1 - self._config.least_gain) and transfers_s <= self._config.moving_steps * gain_s:
                worth, kept_s, transfers_s = len(tried), now_s, 0.0
        self._settled = None if worth else began
        return tuple(tried[:worth])

    def _score_s(self, seating: _Seating) -> float:
        """Return the estimated step, and a little of every sum: the slowest one hides what the others would save."""
        sums_s = 0.0
        for group in self._job.weights:
            ring = ring_of(group, seating.holders)
            if len(ring) > 1:
                sums_s += self._job.ring_s(ring, group.size_bytes)
        return step_estimate(self._job, seating.holders).step_s + _SHARE_OF_SUMS * sums_s

    def _takers(self, stage: int, now: _Seating) -> Iterator[_Change]:
        """Yield who can take a stage that nobody holds; holders of other stages leave those only if nobody else can."""
        job = self._job
        nobody = True
        for machine in now.spare:
            if job.possible(stage, machine):
                nobody = False
                yield self._joined(machine, stage, now)
        for machine, seats in seats_of(now.holders).items():
            if job.room(stage, machine, seats):
                nobody = False
                yield self._joined(machine, stage, now, keeps=True)
        if not nobody:
            return
        for source, machines in enumerate(now.holders):
            for machine in machines if len(machines) > 1 else ():
                if job.possible(stage, machine):
                    yield self._moved(machine, source, stage, now)

    def _joined(self, machine: int, stage: int, now: _Seating, *, keeps: bool = False) -> _Change:
        """Return what becomes of it if a machine holds a stage too."""
        after = now.after(machine, {stage: [*now.holders[stage], machine]})
        return _Change(Placement(machine, stage, keeps=keeps), after, self._loading_s(machine, stage, now))

    def _relieved(self, holder: int, machine: int, stage: int, now: _Seating, *, keeps: bool = False) -> _Change:
        """Return what becomes of it if a machine takes a holder's place."""
        rest = [each for each in now.holders[stage] if each != holder]
        after = now.after(machine, {stage: [*rest, machine]})
        return _Change(Placement(machine, stage, holder, keeps=keeps), after, self._loading_s(machine, stage, now))

    def _moved(self, machine: int, source: int, target: int, now: _Seating) -> _Change:
        """Return what becomes of it if a holder leaves its stage for another."""
        rest = [each for each in now.holders[source] if each != machine]
        after = now.after(machine, {source: rest, target: [*now.holders[target], machine]})
        return _Change(Placement(machine, target), after, self._loading_s(machine, target, now))

    def _taking_over_s(self, change: _Change, stage: int) -> float:
        """Return the seconds in which a machine loads an empty stage's state, and some steps are done with it."""
        job, machine = self._job, change.placement.machine
        # As if it took the other empty stages too, so that its links to whoever is there count.
        step_s = step_estimate(job, [each or (machine,) for each in change.after.holders]).step_s
        if math.isinf(step_s):
            step_s = job.microbatches * job.pass_s(stage, machine)
        return change.transfer_s + self._config.moving_steps * step_s

    def _faster(self, now: _Seating) -> _Change | None:
        """Return the change that shortens the next steps and the rest of this one most.

        A spare machine joins a stage, or takes its holder's place: at once, where that is sooner than the end of the
        step. Half of that is left on average, and the stage's part of it may have to be done again.
        """
        if now == self._complete:
            return None
        config, now_s = self._config, self._score_s(now)
        best: tuple[float, _Change] | None = None
        for change in self._entries(now):
            step_s = self._score_s(change.after)
            if step_s > now_s * (1 - config.least_gain):
                continue
            rest_s = now_s / 2
            if change.placement.replaces is not None:
                if change.transfer_s > config.moving_steps * (now_s - step_s):
                    continue
                again_s = change.transfer_s + 2 * step_s
                if again_s < rest_s:
                    rest_s = again_s
                    change = replace(change, placement=replace(change.placement, at_once=True))
            done_s = rest_s + config.moving_steps * step_s
            if best is None or done_s < best[0]:
                best = done_s, change
        self._complete = now if best is None else None
        return None if best is None else best[1]

    def _entries(self, now: _Seating) -> Iterator[_Change]:
        """Yield the ways in which a spare machine can come in."""
        for stage in range(self._job.stages):
            for machine in now.spare:
                if stage not in self._job.pinned and self._job.possible(stage, machine):
                    yield self._joined(machine, stage, now)
                    for holder in now.holders[stage]:
                        yield self._relieved(holder, machine, stage, now)

    def _safer(self, now: _Seating, view: Staffing) -> _Change | None:
        """Return a second holder for a stage that has one, if it costs less than the only one's death on average."""
        job = self._job
        now_s = step_estimate(job, now.holders).step_s
        deaths_per_s = view.deaths / (len(job.peers) * view.now_s) if view.now_s > 0 else 0.0
        best: tuple[float, _Change] | None = None
        for stage, holders in enumerate(now.holders):
            if len(holders) != 1 or stage in job.pinned:
                continue
            for machine in now.spare:
                if not job.possible(stage, machine):
                    continue
                change = self._joined(machine, stage, now)
                # A death costs what it undoes, and loading the state.
                undone_s = self._config.snapshot_steps / 2 * now_s + job.state_s(holders[0], machine, stage)
                worth_s = now_s * min(0.5, deaths_per_s * undone_s)
                own_s = sum(
                    job.ring_s(ring_of(group, change.after.holders), group.size_bytes)
                    for group in job.weights
                    if stage in group.stages
                )
                if own_s > worth_s:
                    continue
                cost_s = max(own_s, step_estimate(job, change.after.holders).step_s - now_s)
                if cost_s <= worth_s and (best is None or cost_s < best[0]):
                    best = cost_s, change
        return None if best is None else best[1]

    def _changes(self, now: _Seating) -> Iterator[_Change]:
        """Yield single changes between two steps."""
        job = self._job
        seats = seats_of(now.holders)
        for source in range(job.stages):
            if source in job.pinned:
                continue
            for machine in now.holders[source]:
                for other in now.spare:
                    if job.possible(source, other):
                        yield self._relieved(machine, other, source, now)
                for other, others in seats.items():
                    if source not in others and job.room(source, other, others):
                        yield self._relieved(machine, other, source, now, keeps=True)
                if len(now.holders[source]) == 1 or len(seats[machine]) > 1:
                    continue
                rest = [each for each in now.holders[source] if each != machine]
                yield _Change(Placement(machine, None), now.after(machine, {source: rest}), 0.0)
                for target in range(job.stages):
                    if target != source and target not in job.pinned and job.possible(target, machine):
                        yield self._moved(machine, source, target, now)

    def _loading_s(self, machine: int, stage: int, now: _Seating) -> float:
        """Return the seconds in which a machine gets a stage's state: from a holder, or from a snapshot near by."""
        job, holders = self._job, now.holders[stage]

        def nearest_s(sources: Iterable[int]) -> float:
            return min((job.state_s(each, machine, stage) for each in sources if each != machine), default=0.0)

        if holders and not self._config.replays:
            return nearest_s(holders)
        near_s = nearest_s(now.known)
        if not holders:
            return near_s
        again_s = self._config.snapshot_steps / 2 * job.microbatches * job.pass_s(stage, machine)
        return min(nearest_s(holders), near_s + again_s)
