"""What a job does about what happens to it: one pure function, for broker, driver and stages alike.

Each of them sees events that the others do not, and each has its own view. None decides by itself how long to wait or
whether to end the job: `decide` does, from the view and the event alone, without a clock and without I/O. Today the
actions are to wait, to ask for another plan, to refuse relief, to drop a plan or a share, and to end the job. Replacing
a lost machine will be one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusionai.scheduling.job_events import (
    Came,
    Failed,
    GivenUp,
    JobEvent,
    Left,
    LinkLost,
    Lost,
    Misreported,
    PlanFailed,
    Slow,
    Stalled,
    WishesToGo,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long what has happened may stand before something is done about it."""

    broker_link_s: float = 5.0
    """A machine without a connection to the broker. Tensors do not pass through the broker, so this is not yet a death:
    a machine that really died is noticed sooner, by the driver. Too short ends jobs for a router's restart; too long
    keeps machines leased to a job whose owner is gone."""
    broker_restart_s: float = 90.0
    """The same after a restart of the broker: all machines are gone then, and try again at least every 30 s."""
    driver_link_s: float = 0.0
    """A machine without a link to the driver. A link ends by a reset or after seconds of silence, so the machine is
    dead or cut off by then, and a step cannot end without it."""
    neighbour_link_s: float = 5.0
    """Two stages without a link to each other. The driver knows better when one of them has died, and has the first
    word; both may well be alive, and then only they can tell."""
    least_stall_s: float = 300.0
    """A round that does not end. A dead machine is noticed in seconds by its link; this catches one that lives but
    computes no more, so it is long: a step may wait for a compiler."""
    stall_rounds: float = 20.0
    """A round may also take so many times the longest one so far."""
    tensor_s: float = 3600.0
    """One machine's weights on their way to the driver; the largest take minutes on a slow line."""
    least_left_s: float = 10.0
    """A job that is over sooner, at its present pace, keeps its plan: to make and prepare another takes seconds."""
    pause_steps: int = 10
    """Steps after a plan was sought before the next is: its pace must be seen first. Twice as many after each, since on
    a machine that others use too, what is noticed comes and goes, and plans must not follow."""
    most_pause_steps: int = 640
    attempts: int = 3
    """To relieve a machine, where plans are found and something fails after that. Where there is no plan, further
    attempts would find none either."""

    def pause_after(self, sought: int) -> int:
        """Return how many steps pass until the next plan is sought, when `sought` were sought before this one."""
        doubled = self.pause_steps << min(sought, 32)
        return min(doubled, max(self.pause_steps, self.most_pause_steps))

    def stall_s(self, longest_s: float) -> float:
        """Return how long a round may take when the longest so far took `longest_s`."""
        return max(self.least_stall_s, self.stall_rounds * longest_s)


PATIENCE = Patience()
"""What everybody goes by who is not told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job as whoever noticed an event knows it."""

    seen_by: Literal["broker", "driver", "stage"]
    patience: Patience
    owner: str = ""
    driver: str = ""
    machines: frozenset[str] = frozenset()
    """Holders of the running plan's stages, as far as whoever asks knows them."""
    prepared: frozenset[str] = frozenset()
    """Machines that only a prepared plan uses."""
    waited_s: float = 0.0
    """How long the event has stood already."""
    mended: bool = False
    """Whether what was lost is back."""
    restarted: bool = False
    """Whether the broker has restarted and waits for everybody."""
    may_replan: bool = False
    """Whether the owner lets the plan be changed."""
    left_s: float = 0.0
    """Seconds that the job still takes, at its present pace."""
    paused: bool = False
    """Whether the last plan was sought too recently to judge it."""
    relieving: bool = False
    """Whether the plan that failed was to relieve a machine."""
    attempts: int = 0
    """Plans that failed to relieve it, this one included."""
    hopeless: bool = False
    """Whether no plan fits at all, so that a further attempt would fail as well."""


# --- actions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Wait, then decide again: what was lost may be back by then."""

    seconds: float


@dataclass(frozen=True, slots=True)
class AskForPlan:
    """Have the broker look for another plan."""


@dataclass(frozen=True, slots=True)
class RefuseRelief:
    """Tell the machines that want to go that nobody can take their parts."""

    because: WishesToGo | PlanFailed


@dataclass(frozen=True, slots=True)
class DropPlan:
    """Give up the plan that is prepared; the job goes on by the running one."""

    because: JobEvent


@dataclass(frozen=True, slots=True)
class DropShare:
    """Drop this machine's share without a word to the driver, who is gone."""

    because: JobEvent


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job cannot go on."""

    because: JobEvent


Action = LookAgain | AskForPlan | RefuseRelief | DropPlan | DropShare | EndJob


def decide(view: JobView, event: JobEvent) -> tuple[Action, ...]:
    """Return what is to be done about an event, in order; nothing where it concerns nobody, or has mended."""
    match event:
        case Lost(peer):
            patience_s = view.patience.broker_restart_s if view.restarted else view.patience.broker_link_s
            return _absent(view, event, peer, patience_s)
        case Left(peer):
            return _absent(view, event, peer, 0.0)
        case LinkLost():
            return _link_lost(view, event)
        case Stalled():
            return _stalled(view, event)
        case Failed() | Misreported() | GivenUp():
            return (EndJob(event),)
        case WishesToGo():
            # A job that is over soon relieves everybody by itself.
            return _if_worth(view) if view.may_replan else (RefuseRelief(event),)
        case PlanFailed() if view.relieving:
            hopeless = view.hopeless or view.attempts >= view.patience.attempts
            return (RefuseRelief(event),) if hopeless else (AskForPlan(),)
        case Slow() | Came() | PlanFailed():
            return () if view.paused else _if_worth(view)


def _absent(view: JobView, event: Lost | Left, peer: str, patience_s: float) -> tuple[Action, ...]:
    """A machine is away from the broker."""
    ends = peer == view.owner or peer in view.machines
    if view.mended or not (ends or peer in view.prepared):
        return ()
    if view.waited_s < patience_s:
        return (LookAgain(patience_s - view.waited_s),)
    return (EndJob(event),) if ends else (DropPlan(event),)


def _link_lost(view: JobView, event: LinkLost) -> tuple[Action, ...]:
    """A link between two machines of the job is gone."""
    if event.there == view.driver or view.seen_by == "driver":
        if view.mended and view.waited_s > 0:
            return ()
        lost = Lost(event.there, event.cause)
        action = EndJob(lost) if view.seen_by == "driver" else DropShare(lost)
        return _after(view, view.patience.driver_link_s, action)
    if event.there not in view.machines or view.mended:
        return ()
    return _after(view, 0.0 if event.broke_rules else view.patience.neighbour_link_s, EndJob(event))


def _stalled(view: JobView, event: Stalled) -> tuple[Action, ...]:
    limit_s = view.patience.tensor_s if event.awaited == "tensor" else view.patience.stall_s(event.longest_s)
    if event.waited_s < limit_s:
        return (LookAgain(limit_s - event.waited_s),)
    return (EndJob(event),)


def _if_worth(view: JobView) -> tuple[Action, ...]:
    return (AskForPlan(),) if view.may_replan and view.left_s > view.patience.least_left_s else ()


def _after(view: JobView, patience_s: float, action: Action) -> tuple[Action, ...]:
    return (action,) if view.waited_s >= patience_s else (LookAgain(patience_s - view.waited_s),)
