"""Waiting until nothing is held, on its own: what ends it, and with which words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fusionai.compnode.agent import AgentConfig
from fusionai.compnode.relief import Relief
from fusionai.errors import ConfigError, PeerLost
from fusionai.pool.identifiers import FIRST_EPOCH, JobId
from fusionai.pool.messages import HeldShare, NoReplacement, WishToLeave

HELD = [HeldShare(JobId("job"), FIRST_EPOCH, "stage 0: layers 0-3")]


def waited(after: Callable[[Relief, list[HeldShare]], Awaitable[None]], within_s: float = 5.0) -> str:
    async def main() -> str:
        held = list(HELD)
        relief = Relief(lambda: held)

        async def ask(message: WishToLeave) -> None:
            assert message.reason == "why"
            await after(relief, held)

        return await relief.wait(ask, "why", within_s)

    return asyncio.run(main())


def later(call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(0.05, call)


def test_it_ends_when_nothing_is_held() -> None:
    async def after(relief: Relief, held: list[HeldShare]) -> None:
        later(relief.changed)  # of another job: this one is held still

        def released() -> None:
            held.clear()
            relief.changed()

        asyncio.get_running_loop().call_later(0.15, released)

    assert waited(after) == ""


def test_it_ends_when_nobody_takes_it() -> None:
    async def refused(relief: Relief, held: list[HeldShare]) -> None:
        later(lambda: relief.refused(NoReplacement("no memory")))

    async def cut_off(relief: Relief, held: list[HeldShare]) -> None:
        later(lambda: relief.cut_off("reset"))
        later(lambda: relief.refused(NoReplacement("the first word counts")))

    async def unheard(relief: Relief, held: list[HeldShare]) -> None:
        raise PeerLost("nobody there")

    async def silent(relief: Relief, held: list[HeldShare]) -> None:
        await asyncio.sleep(10)

    assert waited(refused) == "no memory"
    assert waited(cut_off) == "the broker is lost: reset"
    assert waited(unheard) == "nobody there"
    assert waited(silent, within_s=0.1) == "nobody took it within 0.1 s"


def test_it_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that was away did not hear the first time."""
    monkeypatch.setattr("fusionai.compnode.relief.ASK_AGAIN_S", 0.05)
    asked: list[None] = []

    async def heard_at_last(relief: Relief, held: list[HeldShare]) -> None:
        asked.append(None)
        if len(asked) == 3:
            held.clear()
            relief.changed()

    assert waited(heard_at_last) == ""
    assert len(asked) == 3

    async def silent(relief: Relief, held: list[HeldShare]) -> None:
        asked.append(None)

    assert waited(silent, within_s=0.2) == "nobody took it within 0.2 s"
    assert 4 <= len(asked) <= 7


def test_what_came_before_the_question_does_not_count() -> None:
    async def main() -> str:
        relief = Relief(lambda: HELD)
        relief.cut_off("long ago")

        async def ask(message: WishToLeave) -> None:
            return None

        return await relief.wait(ask, "why", 0.1)

    assert asyncio.run(main()) == "nobody took it within 0.1 s"


@pytest.mark.parametrize("drain_s", [-1.0, 1e6, float("nan")])
def test_a_drain_is_between_nothing_and_a_day(drain_s: float, tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="drain must be between 0 and 86400 seconds"):
        AgentConfig(token="", name="a", state_folder=tmp_path, drain_s=drain_s)  # type: ignore[arg-type]
