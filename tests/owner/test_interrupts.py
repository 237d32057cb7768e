"""Signals of the process become a request to stop, for as long as a job runs, and no longer."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionai.owner.interrupts import run_interruptibly
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.stop_request import JobStopped, StopRequest, TrainingInterrupted

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Afterwards all signals are handled as before."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as made:
        yield made


async def steps(stop: StopRequest) -> None:
    """Wait until the job is to end."""
    await stop.wait_for(asyncio.get_running_loop().create_future())
    raise JobStopped("interrupted after step 3")


def signalled(folder: RunFolder, *numbers: int, begun: bool = True, **options: Any) -> None:
    """Run a job in the midst of which signals come."""

    async def main(stop: StopRequest) -> None:
        if begun:
            stop.step_done(1.0)
        for number in numbers:
            signal.raise_signal(number)
            if len(numbers) == 1:
                await steps(stop)
        await asyncio.sleep(60)

    run_interruptibly(main, folder, **{"python": True, **options})


@pytest.mark.parametrize("python", [True, False])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_stops_the_job_in_order(folder: RunFolder, number: int, python: bool) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with pytest.raises(TrainingInterrupted, match="interrupted after step 3"):
        signalled(folder, number, python=python)
    assert [signal.getsignal(each) for each in NUMBERS] == before
    assert issubclass(TrainingInterrupted, KeyboardInterrupt), "programs catch that"


def test_before_the_first_step_it_ends_at_once(folder: RunFolder) -> None:
    words = "^interrupted before the first step was done; no checkpoint has been made yet$"
    with pytest.raises(TrainingInterrupted, match=words):
        signalled(folder, signal.SIGINT, begun=False)


def test_a_second_signal_does_not_wait_for_the_step(folder: RunFolder) -> None:
    with pytest.raises(
        TrainingInterrupted, match="interrupted twice, so the step under way was not ended; no checkpoint"
    ):
        signalled(folder, signal.SIGINT, signal.SIGTERM)


def test_a_third_signal_interrupts_whatever_runs(folder: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        signalled(folder, signal.SIGINT, signal.SIGINT, signal.SIGINT)
    assert caught.type is KeyboardInterrupt


def test_the_command_line_leaves_at_the_second(folder: RunFolder) -> None:
    class Left(BaseException):
        pass

    def leave() -> None:
        raise Left

    with pytest.raises(Left):
        signalled(folder, signal.SIGINT, signal.SIGINT, python=False, second=leave)


@pytest.mark.parametrize(("python", "heard"), [(True, 1), (False, 0)])
def test_a_handler_of_the_program_is_left_to_it(folder: RunFolder, python: bool, heard: int) -> None:
    calls: list[int] = []

    def handler(number: int, frame: object) -> None:
        calls.append(number)

    async def main(stop: StopRequest) -> None:
        stop.step_done(1.0)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.01)
        assert stop.asked is not python

    signal.signal(signal.SIGTERM, handler)
    run_interruptibly(main, folder, python=python)
    assert len(calls) == heard
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_ignored_signal_stays_ignored(folder: RunFolder) -> None:
    async def main(stop: StopRequest) -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0.01)
        assert not stop.asked

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_interruptibly(main, folder, python=False)


def test_another_thread_gets_no_signals(folder: RunFolder) -> None:
    found: list[Callable[..., Any] | int | None] = []

    async def main(stop: StopRequest) -> None:
        found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=lambda: run_interruptibly(main, folder, python=True))
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_an_error_of_the_job_stays_what_it_is(folder: RunFolder) -> None:
    async def main(stop: StopRequest) -> None:
        raise asyncio.CancelledError  # not by a request

    with pytest.raises(asyncio.CancelledError):
        run_interruptibly(main, folder, python=True)
