"""How long a machine has been a member, how much of that it was there, and how often it vanished.

What happens while the broker itself is away is not known and counts as nothing: neither as presence nor as a loss.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from fusionai.scheduling.profile import Availability

PRIOR_BETWEEN_LOSSES_S = 86_400.0
"""A new machine is assumed to vanish once a day. The assumption weighs as much as one day of observation."""

BLIP_S = 5.0
"""A member that is back within this time was only cut off, and is not counted as lost: by default no job ends within
it."""


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """A member's history. Times are Unix times."""

    first_s: float = 0.0
    """When it first joined; 0 in records of versions that did not note it."""
    since_s: float | None = None
    """Since when it is there now; None: it is away."""
    present_s: float = 0.0
    """Seconds of all stays that have ended."""
    losses: int = 0
    leaves: int = 0
    lost_s: float | None = None
    """When it vanished last, if it has not come back since."""


def arrived(before: Presence, now_s: float) -> Presence:
    """Return the history of a member that registers, for the first time, again, or though it was never seen to go."""
    if before.since_s is not None:
        return before
    first_s = before.first_s or now_s
    if before.lost_s is not None and 0 <= now_s - before.lost_s <= BLIP_S:
        return replace(before, first_s=first_s, since_s=now_s, losses=max(0, before.losses - 1), lost_s=None)
    return replace(before, first_s=first_s, since_s=now_s, lost_s=None)


def departed(before: Presence, state: str, now_s: float) -> Presence:
    """Return the history of a member that is "lost", has "left", or is "unreachable" since the broker's restart."""
    if before.since_s is None:
        return before
    return replace(
        before,
        since_s=None,
        present_s=before.present_s + max(0.0, now_s - before.since_s),
        losses=before.losses + (state == "lost"),
        leaves=before.leaves + (state == "left"),
        lost_s=now_s if state == "lost" else None,
    )


def availability(presence: Presence, now_s: float) -> Availability:
    """Return the figures of a history.

    Losses are taken to come at a constant rate, with a Gamma(1, `PRIOR_BETWEEN_LOSSES_S`) prior, the conjugate of the
    Poisson distribution (Gelman et al., Bayesian Data Analysis, section 2.6): the expected rate after n losses in t
    seconds is (1 + n) / (prior + t), and its inverse is the mean time between losses.
    """
    stay_s = 0.0 if presence.since_s is None else max(0.0, now_s - presence.since_s)
    present_s = presence.present_s + stay_s
    member_s = max(present_s, now_s - presence.first_s) if presence.first_s else present_s
    return Availability(
        member_s=member_s,
        present_s=present_s,
        losses=presence.losses,
        leaves=presence.leaves,
        mean_time_between_losses_s=(PRIOR_BETWEEN_LOSSES_S + present_s) / (1 + presence.losses),
    )
