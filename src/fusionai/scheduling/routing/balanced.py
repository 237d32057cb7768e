"""Who holds which stage, by the estimated step: FusionAI's way.

A stage that lost its holders goes to whoever makes the next steps shortest: a machine of the pool, or one that holds
another stage and has the memory for a second. So a fast cluster that is one machine short goes on at a part of its
speed, instead of sending every tensor out and back over slow links. Who comes back relieves whoever does two stages'
work or computes behind a slow link, in the middle of a step if waiting for its end would take longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusionai.scheduling.routing.job import RoutedJob, ring_of
from fusionai.scheduling.routing.membership import Membership, Placement, Staffing
from fusionai.scheduling.routing.step_estimate import seats_of, step_estimate

_SHARE_OF_SUMS = 0.1
"""Of the seconds of all sums, added to the step where changes are compared."""

_Holders = Sequence[Sequence[int]]


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
class _Change:
    """One change of who holds what."""

    placement: Placement
    holders: list[list[int]]
    """Afterwards."""
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
        self._settled: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] | None = None
        """Holders and spares for which there is nothing to change."""

    def placements(self, view: Staffing) -> tuple[Placement, ...]:
        """Fill empty stages, then let in whoever shortens the step."""
        holders = [list(each) for each in view.holders]
        spare = list(view.spare)
        found: list[Placement] = []

        def take(change: _Change) -> None:
            nonlocal holders
            found.append(change.placement)
            holders = change.holders
            if change.placement.machine in spare:
                spare.remove(change.placement.machine)

        for stage in range(self._job.stages):
            if holders[stage] or stage in self._job.pinned:
                continue
            takers = list(self._takers(stage, holders, spare))
            if takers:
                take(min(takers, key=lambda each: (self._taking_over_s(each, stage), each.placement.machine)))
        while spare and all(holders):
            chosen = self._faster(holders, spare) or self._safer(holders, spare, view)
            if chosen is None:
                break
            take(chosen)
        return tuple(found)

    def moves(self, view: Staffing) -> tuple[Placement, ...]:
        """Return the changes that shorten the step, together, while they pay for their transfers.

        A holder changes its stage, gives it to a machine of the pool or to another holder, or leaves for the pool.
        Where two machines hold the step up, relieving one alone saves nothing, so changes are looked at together.
        """
        if not all(view.holders) or (view.holders, view.spare) == self._settled:
            return ()
        holders: _Holders = view.holders
        spare = list(view.spare)
        tried: list[Placement] = []
        worth = 0
        transfers_s = 0.0
        kept_s = now_s = self._score_s(holders)
        while len(tried) < self._config.most_moves:
            busy = {each.machine for each in tried} | {each.replaces for each in tried}
            best: tuple[float, float, _Change] | None = None
            for change in self._changes(holders, spare):
                if {change.placement.machine, change.placement.replaces} & busy - {None}:
                    continue  # whoever changes does so once, and those who leave load nothing now
                step_s = self._score_s(change.holders)
                cost_s = step_s + change.transfer_s / self._config.moving_steps
                if math.isfinite(cost_s) and (best is None or cost_s < best[0]):
                    best = cost_s, step_s, change
            if best is None or best[1] >= now_s:
                break
            _, now_s, change = best
            holders = change.holders
            tried.append(change.placement)
            transfers_s += change.transfer_s
            if change.placement.machine in spare:
                spare.remove(change.placement.machine)
            gain_s = kept_s - now_s
            if now_s < kept_s * (1 - self._config.least_gain) and transfers_s <= self._config.moving_steps * gain_s:
                worth, kept_s, transfers_s = len(tried), now_s, 0.0
        self._settled = None if worth else (view.holders, view.spare)
        return tuple(tried[:worth])

    def _score_s(self, holders: _Holders) -> float:
        """Return the estimated step, and a little of every sum: the slowest one hides what the others would save."""
        sums_s = 0.0
        for group in self._job.weights:
            ring = ring_of(group, holders)
            if len(ring) > 1:
                sums_s += self._job.ring_s(ring, group.size_bytes)
        return step_estimate(self._job, holders).step_s + _SHARE_OF_SUMS * sums_s

    def _takers(self, stage: int, holders: _Holders, spare: Sequence[int]) -> Iterator[_Change]:
        """Yield who can take a stage that nobody holds; holders of other stages leave those only if nobody else can."""
        job, others = self._job, {each for machines in holders for each in machines} | set(spare)
        nobody = True
        for machine in spare:
            if job.possible(stage, machine):
                nobody = False
                yield self._added(machine, stage, holders, others)
        for machine, seats in seats_of(holders).items():
            if job.room(stage, machine, seats):
                nobody = False
                yield self._added(machine, stage, holders, others, keeps=True)
        if not nobody:
            return
        for source, machines in enumerate(holders):
            for machine in machines if len(machines) > 1 else ():
                if job.possible(stage, machine):
                    change = self._added(machine, stage, holders, others)
                    change.holders[source].remove(machine)
                    yield change

    def _added(self, machine: int, stage: int, holders: _Holders, known: set[int], *, keeps: bool = False) -> _Change:
        after = _after(holders, {stage: sorted([*holders[stage], machine])})
        return _Change(Placement(machine, stage, keeps=keeps), after, self._loading_s(machine, stage, holders, known))

    def _taking_over_s(self, change: _Change, stage: int) -> float:
        """Return the seconds in which a machine loads an empty stage's state, and some steps are done with it."""
        job, machine = self._job, change.placement.machine
        # As if it took the other empty stages too, so that its links to whoever is there count.
        filled = [each or [machine] for each in change.holders]
        step_s = step_estimate(job, filled).step_s
        if math.isinf(step_s):
            step_s = job.microbatches * job.pass_s(stage, machine)
        return change.transfer_s + self._config.moving_steps * step_s

    def _faster(self, holders: _Holders, spare: Sequence[int]) -> _Change | None:
        """Return the change that shortens the next steps and the rest of this one most.

        A spare machine joins a stage, or takes its holder's place.
        """
        now_s = self._score_s(holders)
        best: tuple[float, _Change] | None = None
        known = {each for machines in holders for each in machines} | set(spare)
        for stage in range(self._job.stages):
            if stage in self._job.pinned:
                continue
            for machine in spare:
                if not self._job.possible(stage, machine):
                    continue
                for change in (
                    self._added(machine, stage, holders, known),
                    *(self._relieved(each, machine, stage, holders, known, now_s) for each in holders[stage]),
                ):
                    step_s = self._score_s(change.holders)
                    earned_s = self._config.moving_steps * (now_s - step_s)
                    if change.placement.replaces is not None and change.transfer_s > earned_s:
                        continue
                    if step_s > now_s * (1 - self._config.least_gain):
                        continue
                    # At once, the stage's part of this step may have to be done again.
                    rest_s = change.transfer_s + 2 * step_s if change.placement.at_once else now_s / 2
                    done_s = rest_s + self._config.moving_steps * step_s
                    if best is None or done_s < best[0]:
                        best = done_s, change
        return None if best is None else best[1]

    def _relieved(
        self, holder: int, machine: int, stage: int, holders: _Holders, known: set[int], now_s: float
    ) -> _Change:
        """Return what becomes of it if a machine takes a holder's place.

        At once, where that is sooner than the end of the step: half of it is left on average, and the stage's part of
        it may have to be done again. `now_s`: the present step; 0 between two steps.
        """
        rest = [each for each in holders[stage] if each != holder]
        after = _after(holders, {stage: sorted([*rest, machine])})
        transfer_s = self._loading_s(machine, stage, holders, known)
        keeps = len(seats_of(holders).get(machine, [])) > 0
        at_once = transfer_s + 2 * self._score_s(after) < now_s / 2
        return _Change(Placement(machine, stage, holder, keeps=keeps, at_once=at_once), after, transfer_s)

    def _safer(self, holders: _Holders, spare: Sequence[int], view: Staffing) -> _Change | None:
        """Return a second holder for a stage that has one, if it costs less than the only one's death on average."""
        job = self._job
        now_s = step_estimate(job, holders).step_s
        deaths_per_s = view.deaths / (len(job.peers) * view.now_s) if view.now_s > 0 else 0.0
        known = {each for machines in holders for each in machines} | set(spare)
        best: tuple[float, _Change] | None = None
        for stage in range(job.stages):
            if len(holders[stage]) != 1 or stage in job.pinned:
                continue
            for machine in spare:
                if not job.possible(stage, machine):
                    continue
                change = self._added(machine, stage, holders, known)
                # A death costs what it undoes, and loading the state.
                undone_s = self._config.snapshot_steps / 2 * now_s + job.state_s(holders[stage][0], machine, stage)
                worth_s = now_s * min(0.5, deaths_per_s * undone_s)
                own_s = sum(
                    job.ring_s(ring_of(group, change.holders), group.size_bytes)
                    for group in job.weights
                    if stage in group.stages
                )
                cost_s = max(own_s, step_estimate(job, change.holders).step_s - now_s)
                if cost_s <= worth_s and (best is None or cost_s < best[0]):
                    best = cost_s, change
        return None if best is None else best[1]

    def _changes(self, holders: _Holders, spare: Sequence[int]) -> Iterator[_Change]:
        """Yield single changes between two steps."""
        job = self._job
        seats = seats_of(holders)
        known = set(seats) | set(spare)
        for source in range(job.stages):
            if source in job.pinned:
                continue
            for machine in holders[source]:
                rest = [each for each in holders[source] if each != machine]
                for other in spare:
                    if job.possible(source, other):
                        yield self._relieved(machine, other, source, holders, known, 0.0)
                for other, others in seats.items():
                    if source not in others and job.room(source, other, others):
                        yield self._relieved(machine, other, source, holders, known, 0.0)
                if not rest or len(seats[machine]) > 1:
                    continue
                yield _Change(Placement(machine, None), _after(holders, {source: rest}), 0.0)
                for target in range(job.stages):
                    if target != source and target not in job.pinned and job.possible(target, machine):
                        after = _after(holders, {source: rest, target: sorted([*holders[target], machine])})
                        transfer_s = self._loading_s(machine, target, holders, known)
                        yield _Change(Placement(machine, target), after, transfer_s)

    def _loading_s(self, machine: int, stage: int, holders: _Holders, known: set[int]) -> float:
        """Return the seconds in which a machine gets a stage's state: from a holder, or from a snapshot near by."""
        job = self._job
        direct_s = min((job.state_s(each, machine, stage) for each in holders[stage] if each != machine), default=0.0)
        near_s = min((job.state_s(each, machine, stage) for each in known if each != machine), default=0.0)
        if not holders[stage]:
            return near_s
        if not self._config.replays:
            return direct_s
        again_s = self._config.snapshot_steps / 2 * job.microbatches * job.pass_s(stage, machine)
        return min(direct_s, near_s + again_s)


def _after(holders: _Holders, changes: Mapping[int, list[int]]) -> list[list[int]]:
    return [changes.get(place, list(each)) for place, each in enumerate(holders)]
