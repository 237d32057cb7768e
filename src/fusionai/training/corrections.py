"""Live corrections of a running plan: how fast its machines are by the stage times observed, against what it reckons.

Stage times are noisy by 5 to 10 %, and the estimator errs by as much. So a machine's factor is the median of its last
steps, and it has drifted only if that is clearly beyond both. Times before a sudden change are forgotten once the
change is certain: the factor then tells the speed of now, not a mixture.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import msgspec

from fusionai.errors import ConfigError
from fusionai.scheduling.pipeline import Edge, StageTimes, pipeline_times
from fusionai.scheduling.plan import Plan, StagePlan
from fusionai.scheduling.profile import DeviceProfile

NOTICED = 1.25
"""Slower or faster by this factor is a drift.

Above what noise of 10 % and an estimator within 10 % make together (1.1 * 1.1 = 1.21), below a slow-down of 1.5, which
three steps in a row then show. A smaller change is seen in the factors, but reported by nobody.
"""

_HALVINGS = 12
"""Halvings of the predicted step, after which the latency that explains it is known well enough."""


class MeasuredPasses(msgspec.Struct, frozen=True):
    """What one stage took in one step on its machine: seconds summed over its microbatches."""

    peer: str
    stage: int
    forward_s: float
    backward_s: float
    microbatches: int


class Drift(msgspec.Struct, frozen=True):
    """A machine that is no longer as fast as the running plan reckons."""

    peer: str
    factor: float
    """Measured over predicted seconds: 1.5 is a machine that takes half as long again."""
    since_step: int
    """The first step of those that show it, as far as they are remembered."""


def corrected(device: DeviceProfile, factor: float) -> DeviceProfile:
    """Return a device with every speed divided by `factor`; what it holds stays.

    Raises:
        ConfigError: the factor is not a positive number.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"factor must be a positive number, got {factor}; leave out machines without observed times")
    return msgspec.structs.replace(
        device,
        flops_per_s={name: rate / factor for name, rate in device.flops_per_s.items()},
        memory_bytes_per_s=device.memory_bytes_per_s / factor,
        overhead_s=device.overhead_s * factor,
        update_bytes_per_s=device.update_bytes_per_s / factor,
    )


class Corrections:
    """Records stage times of one running plan, and tells how its machines differ from it.

    Factors are relative to `plan`: where that was made with devices corrected before, the new factor comes on top of
    the old one. A new plan needs a new recorder.
    """

    def __init__(self, plan: Plan, *, window: int = 8, fewest: int = 3) -> None:
        """Watch `plan`, each machine by its last `window` steps at most; `fewest` are needed to say anything.

        Raises:
            ConfigError: not 1 <= fewest <= window.
        """
        if not 1 <= fewest <= window:
            raise ConfigError(f"fewest must be between 1 and window, {window}, got {fewest}")
        self._plan, self._fewest = plan, fewest
        self._stages = {(stage.peer, stage.stage): stage for stage in plan.stages}
        self._seen: dict[str, deque[tuple[int, float]]] = {
            stage.peer: deque(maxlen=window) for stage in plan.stages if _predicted_s(stage) > 0
        }
        self._settled = dict.fromkeys(self._seen, 1.0)
        self._latency_s: float | None = None

    def observe(self, step: int, times: Sequence[MeasuredPasses]) -> None:
        """Take the times of one step. What is not of the plan, or took no time, says nothing and is passed over."""
        measured_s: dict[str, float] = {}
        predicted_s: dict[str, float] = {}
        for each in times:
            stage = self._stages.get((each.peer, each.stage))
            took_s = each.forward_s + each.backward_s
            if stage is None or each.microbatches < 1 or not (took_s > 0 and math.isfinite(took_s)):
                continue
            measured_s[each.peer] = measured_s.get(each.peer, 0.0) + took_s
            predicted_s[each.peer] = predicted_s.get(each.peer, 0.0) + each.microbatches * _predicted_s(stage)
        for peer, seconds in measured_s.items():
            if predicted_s[peer] > 0:
                self._seen[peer].append((step, seconds / predicted_s[peer]))
                self._forget(self._seen[peer])

    def _forget(self, seen: deque[tuple[int, float]]) -> None:
        """Drop what is before a change: the last steps, each of them, are beyond the median of those before."""
        earlier = len(seen) - self._fewest
        if earlier < 1:
            return
        factors = [factor for _, factor in seen]
        usual = median(factors[:earlier])
        latest = factors[earlier:]
        if min(latest) >= NOTICED * usual or max(latest) <= usual / NOTICED:
            for _ in range(earlier):
                seen.popleft()

    def factors(self) -> dict[str, float]:
        """Return measured over predicted seconds by machine, for those with enough steps."""
        return {
            peer: median(factor for _, factor in seen) for peer, seen in self._seen.items() if len(seen) >= self._fewest
        }

    def drifted(self) -> tuple[Drift, ...]:
        """Return the machines whose factor is beyond noise; relative to the last `settle`, if there was one."""
        found = []
        for peer, factor in self.factors().items():
            settled = self._settled[peer]
            if 1 / NOTICED < factor / settled < NOTICED:
                continue
            # Nearer to what it is now than to what it was, in ratios.
            middle = math.sqrt(factor * settled)
            since = [step for step, each in self._seen[peer] if (each > middle) == (factor > settled)]
            found.append(Drift(peer, factor, min(since)))
        return tuple(found)

    def settle(self) -> None:
        """Take today's factors as known: only a further change is a drift.

        For a drift that was answered by keeping the plan, which would else be reported every step.
        """
        self._settled |= self.factors()

    def predicted_step_s(self) -> float:
        """Return the seconds of the plan's step with these factors.

        The schedule is worked through with the plan's own times and again with the factors; the difference is added to
        the plan's prediction. A plan does not tell how a stage's sending is shared between forward and backward, nor
        latencies: of inner stages half is taken for either, and one latency for all hops with which the plan's own
        prediction comes out.
        """
        if self._latency_s is None:
            self._latency_s = self._likely_latency_s()
        own_s = self._worked_s({}, self._latency_s)
        return self._plan.predicted_step_s + self._worked_s(self.factors(), self._latency_s) - own_s

    def _likely_latency_s(self) -> float:
        low_s, high_s = 0.0, self._plan.predicted_step_s
        for _ in range(_HALVINGS):
            middle_s = (low_s + high_s) / 2
            if self._worked_s({}, middle_s) > self._plan.predicted_step_s:
                high_s = middle_s
            else:
                low_s = middle_s
        return low_s

    def _worked_s(self, factors: dict[str, float], latency_s: float) -> float:
        stages, last = self._plan.stages, len(self._plan.stages) - 1
        passes = [
            StageTimes(
                each.peer,
                each.predicted.forward_s * factors.get(each.peer, 1.0),
                each.predicted.backward_s * factors.get(each.peer, 1.0),
                each.in_flight,
            )
            for each in stages
        ]
        edges = [
            Edge(
                stage,
                stage + 1,
                stages[stage].predicted.send_s / (2 if stage > 0 else 1),
                stages[stage + 1].predicted.send_s / (2 if stage + 1 < last else 1),
                latency_s,
            )
            for stage in range(last)
        ]
        updates_s: dict[str, float] = {}
        for each in stages:
            seconds = each.predicted.update_s * factors.get(each.peer, 1.0)
            updates_s[each.peer] = updates_s.get(each.peer, 0.0) + seconds
        return pipeline_times(passes, edges, self._plan.microbatches).makespan_s + max(updates_s.values())


def _predicted_s(stage: StagePlan) -> float:
    """Return the seconds that a plan reckons with for one microbatch of a stage, both ways."""
    return stage.predicted.forward_s + stage.predicted.backward_s
