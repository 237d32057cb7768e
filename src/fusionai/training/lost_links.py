"""What a machine with stages does about a link that is gone: it waits as long as the policy says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fusionai.network.identity import PeerId
from fusionai.pool.job_wire import JobWire
from fusionai.scheduling.job_events import JobEvent, LinkLost, sentence
from fusionai.scheduling.recovery import PATIENCE, Action, JobView, LookAgain, decide
from fusionai.training.roster import Roster


async def settled(event: LinkLost, roster: Callable[[], Roster], wire: JobWire) -> Action | None:
    """Wait until it is clear what is to be done about a lost link, and return it; None: it has mended.

    `roster` gives the roster that this machine goes by now.
    """
    waited_s = 0.0
    while True:
        actions = decide(_view(event, roster(), wire, waited_s), event)
        if not actions:
            return None
        (action,) = actions
        if not isinstance(action, LookAgain):
            return action
        await asyncio.sleep(action.seconds)
        waited_s += action.seconds


def said(event: JobEvent, roster: Roster) -> str:
    """Return what happened, for people, with the names of the roster."""

    def name(peer: str) -> str:
        contact = roster.neighbour(peer)
        return peer[:12] if contact is None else contact.name

    def who(peer: str) -> str:
        return "the owner's machine" if roster.is_driver(peer) else f"compnode {name(peer)}"

    return sentence(event, name=name, who=who)


def _view(event: LinkLost, roster: Roster, wire: JobWire, waited_s: float) -> JobView:
    return JobView(
        seen_by="stage",
        patience=PATIENCE,
        owner=roster.owner,
        driver=roster.driver,
        machines=frozenset(each.peer for each in roster.neighbours),
        waited_s=waited_s,
        mended=wire.linked(PeerId(event.there)),
    )
