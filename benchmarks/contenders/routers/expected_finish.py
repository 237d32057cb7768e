"""Routing by expected finish time over the whole path ahead: FusionAI's way.

The seconds of every pass and transfer are known (measured profiles, the estimator), and so is what each machine has
been given and has not finished. For a microbatch at a sender, a dynamic programme over the stages ahead finds the path
on which it is through first: a machine begins with it when it has arrived and the machine's backlog is worked off, and
takes its forward and its backward; transfers wait for their link, and gradients come home over the same pairs. The
first hop of that path is taken; the next sender decides anew with what is known then.

That is list scheduling by earliest finish (as HEFT's second phase, Topcuoglu et al. 2002), with the backward counted as
work of the machine that did the forward. Corrections by observed times belong to the job's tables: a caller that
measures makes a new `RoutedJob`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contenders.routers.route_policy import Hop, RoutePolicy
from contenders.routers.routed_job import DRIVER, RoutedJob
from fusionai.scheduling.links import Floats, Indices

_UNLINKED_S_PER_BYTE = 1e3
"""Stands for a pair without a link: worse than any other, yet it adds up."""


class ExpectedFinish(RoutePolicy):
    """Earliest expected finish, from backlogs that it keeps itself."""

    def __init__(self, job: RoutedJob, *, wait_s: float = 1.0) -> None:
        """`wait_s`: where deaths show by timeouts only, how long over the expected time a sender waits."""
        self._job = job
        self._wait_s = wait_s
        self._backlog_s: Floats = np.zeros(len(job.peers))
        """By machine: seconds of passes that it has been given and has not finished."""
        self._link_free_s: Floats = np.zeros((len(job.peers), len(job.peers)))
        """When each link has sent what was given to it."""
        self._given: Indices = np.zeros(job.forward_s.shape, dtype=np.int64)
        """(S, N): microbatches that a machine has been given and has not finished."""
        self._room: Indices = job.in_flight.copy()
        """(S, N): most microbatches that a machine may hold of a stage, with all that it holds now."""
        self._period: Floats | None = None
        self._both_s: Floats = job.forward_s + job.backward_s
        self._members: list[list[int]] = [[] for _ in range(job.stages)]
        self._arrays: list[Indices] = [np.zeros(0, dtype=np.int64) for _ in range(job.stages)]
        with np.errstate(divide="ignore"):
            self._slowness: Floats = np.where(job.bandwidth > 0, 1 / job.bandwidth, _UNLINKED_S_PER_BYTE)
        self._hops: dict[int, tuple[Floats, Floats]] = {}
        """By stage: seconds from each holder of the stage before to each of its own, and those home."""

    def choose(self, hop: Hop, candidates: Sequence[int]) -> int:
        """Return the first machine of the path on which the microbatch is through first."""
        if len(candidates) == 1:
            return candidates[0]
        job, stage = self._job, hop.stage
        first: Indices = np.asarray(candidates, dtype=np.int64)
        free_s = self._free_s(hop.now_s)
        arrived = np.full(len(first), hop.now_s)
        home_s = np.zeros(len(first))
        if hop.sender != DRIVER:
            there, back = self._between(np.asarray([hop.sender]), first, stage)
            arrived = np.maximum(hop.now_s, self._link_free_s[hop.sender, first]) + there[0]
            home_s = back[0]
        done = np.maximum(arrived, free_s[stage, first]) + self._both_s[stage, first] + home_s
        # Row c: the best times through each holder of the stage reached so far, given first hop c.
        reached = np.full((len(first), len(first)), np.inf)
        np.fill_diagonal(reached, done)
        before = first
        for onward in range(stage + 1, job.stages):
            members = self._arrays[onward]
            if not len(members):
                break  # nobody holds it at present: what is behind it cannot be told
            there, back = self._known_hops(onward) if onward > stage + 1 else self._between(before, members, onward)
            waiting = self._link_free_s[before[:, None], members[None]]
            through = np.maximum(reached[:, :, None], waiting[None]) + (there + back)[None]
            reached = (
                np.maximum(through.min(axis=1), free_s[onward, members][None]) + self._both_s[onward, members][None]
            )
            before = members
        finish = reached.min(axis=1)
        return int(first[int(np.lexsort((done, finish))[0])])

    def _free_s(self, now_s: float) -> Floats:
        """Return (S, N): when a machine can begin with one more microbatch of a stage.

        It has worked off what it has, and has room: where memory is full, microbatches leave it one by one, in the time
        of the way from it and back over the number that it holds.
        """
        full = np.maximum(self._given + 1 - self._room, 0)
        return np.asarray(now_s + np.maximum(self._backlog_s[None], full * self._period_s()))

    def _period_s(self) -> Floats:
        """Return (S, N): seconds between two microbatches that leave a machine whose memory is full."""
        if self._period is None:
            job = self._job
            trips = np.where(np.isfinite(self._both_s), self._both_s, 0.0)
            onward: Floats | None = None
            for stage in reversed(range(job.stages)):
                if onward is not None and len(self._arrays[stage + 1]):
                    there, back = self._between(np.arange(len(job.peers)), self._arrays[stage + 1], stage + 1)
                    trips[stage] += (there + back + onward[None]).min(axis=1)
                members = self._arrays[stage]
                onward = trips[stage, members] if len(members) else None
            self._period = np.maximum(trips / np.maximum(self._room, 1), self._both_s)
            self._period[~np.isfinite(self._period)] = 0.0
        return self._period

    def wait_s(self, sender: int, stage: int, machine: int) -> float:
        """Return the time that the machine's backlog takes, and a little."""
        return self._wait_s + float(self._backlog_s[machine])

    def began_step(self) -> None:
        """Begin with empty backlogs."""
        self._backlog_s[:] = 0.0
        self._given[:] = 0
        self._link_free_s[:] = 0.0

    def assigned(self, hop: Hop, machine: int) -> None:
        """Add the microbatch's passes to the machine's backlog, its tensor to the link's."""
        self._backlog_s[machine] += self._both_s[hop.stage, machine]
        self._given[hop.stage, machine] += 1
        if hop.sender != DRIVER and hop.sender != machine:
            seconds = self._job.forward_bytes[hop.stage] * self._slowness[hop.sender, machine]
            begin_s = max(hop.now_s, self._link_free_s[hop.sender, machine])
            self._link_free_s[hop.sender, machine] = begin_s + seconds

    def computed(self, stage: int, machine: int, *, backward: bool) -> None:
        """Take a pass off the machine's backlog."""
        if backward:
            self._given[stage, machine] = max(0, self._given[stage, machine] - 1)
        table = self._job.backward_s if backward else self._job.forward_s
        self._take(machine, float(table[stage, machine]))

    def withdrawn(self, stage: int, machine: int, *, forward_done: bool, backward_done: bool) -> None:
        """Take what the machine has not done off its backlog."""
        if not backward_done:
            self._given[stage, machine] = max(0, self._given[stage, machine] - 1)
        left_s = 0.0 if forward_done else float(self._job.forward_s[stage, machine])
        left_s += 0.0 if backward_done else float(self._job.backward_s[stage, machine])
        self._take(machine, left_s)

    def joined(self, stage: int, machine: int) -> None:
        """Count with the machine for the stage."""
        if machine not in self._members[stage]:
            self._members[stage].append(machine)
            self._changed(stage, machine)

    def left(self, stage: int, machine: int) -> None:
        """No longer count with the machine for the stage."""
        if machine in self._members[stage]:
            self._members[stage].remove(machine)
            self._changed(stage, machine)

    def _take(self, machine: int, seconds: float) -> None:
        self._backlog_s[machine] = max(0.0, self._backlog_s[machine] - seconds)

    def _changed(self, stage: int, machine: int) -> None:
        self._room[:, machine] = self._job.in_flight[:, machine]
        seats = [each for each, members in enumerate(self._members) if machine in members]
        for each in seats:
            self._room[each, machine] = self._job.room(each, machine, seats)
        self._arrays[stage] = np.asarray(self._members[stage], dtype=np.int64)
        self._period = None
        self._hops.pop(stage, None)
        self._hops.pop(stage + 1, None)

    def _known_hops(self, stage: int) -> tuple[Floats, Floats]:
        if (found := self._hops.get(stage)) is None:
            found = self._hops[stage] = self._between(self._arrays[stage - 1], self._arrays[stage], stage)
        return found

    def _between(self, sources: Indices, targets: Indices, stage: int) -> tuple[Floats, Floats]:
        """Return (sources, targets): seconds of a microbatch's tensors into `stage`, and of the gradients home."""
        job = self._job
        one, other = sources[:, None], targets[None]
        there = job.forward_bytes[stage] * self._slowness[one, other] + job.delay_s[one, other]
        back = job.gradient_bytes[stage] * self._slowness[other, one] + job.delay_s[other, one]
        return there, back
