"""What can happen to a running job, as values, and the sentence that people read of each.

Whoever notices something makes an event of it and asks `recovery.decide` what to do. The sentence is made at the end,
where somebody must be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Lost:
    """A machine cannot be reached: its connection with the broker is gone, or its link with the driver."""

    peer: str
    cause: str


@dataclass(frozen=True, slots=True)
class Left:
    """A machine has said good-bye and will not come back to its part."""

    peer: str
    cause: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link between two machines is gone; both may be alive."""

    here: str
    """The machine that noticed it."""
    there: str
    cause: str
    broke_rules: bool = False
    """Whether one side ended the link because the other one broke the protocol: it would break again."""


@dataclass(frozen=True, slots=True)
class Stalled:
    """Machines live but give nothing of what they owe."""

    peers: tuple[str, ...]
    awaited: Literal["report", "tensor"]
    waited_s: float
    longest_s: float = 0.0
    """The longest round so far; 0 where it is no round that is waited for."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A machine says that it cannot go on."""

    peer: str
    text: str


@dataclass(frozen=True, slots=True)
class Misreported:
    """A machine reports something that cannot be."""

    peer: str
    problem: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """The broker has given up the job, or a plan of it; the reason is its sentence."""

    reason: str


@dataclass(frozen=True, slots=True)
class Slow:
    """A machine's passes take another time than planned."""

    peer: str
    factor: float
    """How many times as long; below 1 they are faster."""
    since_step: int


@dataclass(frozen=True, slots=True)
class Came:
    """Machines have joined the pool that the plan might use."""

    names: tuple[str, ...]
    more: int = 0
    """How many came beside those named."""


@dataclass(frozen=True, slots=True)
class WishesToGo:
    """A machine of the job wants to leave once others hold what it holds."""

    name: str


@dataclass(frozen=True, slots=True)
class PlanFailed:
    """A new plan was found but could not be taken."""

    error: str


JobEvent = Lost | Left | LinkLost | Stalled | Failed | Misreported | GivenUp | Slow | Came | WishesToGo | PlanFailed


FIXED_PLAN = "its plan may not be changed (placement.replan, placement.cuts)"
"""Why a machine that wants to go is not relieved where the owner forbids other plans."""


def refusal(event: WishesToGo | PlanFailed) -> str:
    """Return why a machine that wants to go is not relieved: its wish is not heard, or no plan could be taken."""
    return event.error if isinstance(event, PlanFailed) else FIXED_PLAN


def sentence(event: JobEvent, *, name: Callable[[str], str], who: Callable[[str], str]) -> str:
    """Return what happened, for people.

    Of a machine's peer, `name` gives its name, such as "anna", and `who` all that is to be said of it, such as
    "compnode anna (stage 1)".
    """
    match event:
        case Lost(peer, cause) | Left(peer, cause):
            return f"{who(peer)} is lost: {cause}"
        case LinkLost(_, there, cause):
            return f"its link to compnode {name(there)} is gone: {cause}"
        case Stalled(peers, "report", waited_s):
            names = ", ".join(name(peer) for peer in peers)
            return f"no report from compnode {names} for {waited_s:.0f} s: it is stalled"
        case Stalled(peers, _, waited_s):
            names = ", ".join(name(peer) for peer in peers)
            return f"compnode {names} sent no tensor for {waited_s:.0f} s: it is stalled"
        case Failed(peer, text):
            return f"{who(peer)} failed: {text}"
        case Misreported(peer, problem):
            return f"{who(peer)} reports {problem}"
        case GivenUp(reason):
            return reason
        case Slow(peer, factor, since_step):
            return f"{name(peer)} takes {factor:.2f} times as long as planned since step {since_step + 1}"
        case Came(names_, more):
            return f"{', '.join(names_)}{f' and {more} more' if more else ''} joined"
        case WishesToGo(leaving):
            return f"{leaving} wants to leave"
        case PlanFailed(error):
            return error
