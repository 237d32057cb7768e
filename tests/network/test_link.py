"""Links over real sockets: requests, notices, bulk, credits, and every way in which a link ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import struct
import time
from asyncio import sslproto
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from network_nodes import Node, pair, until

from fusionai.errors import (
    ConfigError,
    DataError,
    NetworkError,
    PeerLost,
    PeerTimeout,
    ProtocolError,
)
from fusionai.network.credit import LEAST_CHARGE, ReceiveCredit, SendCredit
from fusionai.network.framing import FrameType, frame_prefix
from fusionai.network.limits import Limits
from fusionai.network.loop import run
from fusionai.network.messages import Bulk, encode

Main = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=["fastest", "asyncio"])
def go(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a test on both event loops."""
    return run if request.param == "fastest" else asyncio.run


def test_requests_answers_and_errors(go: Any) -> None:
    async def main() -> None:
        async with pair() as (a, b, link_a, link_b):
            assert await link_a.request("echo", b"hello", timeout_s=60) == b"hello"
            assert await link_b.request("echo", memoryview(b"back"), timeout_s=60) == b"back"
            big = os.urandom(3_000_000)
            assert await link_a.request("echo", big, timeout_s=60) == big
            answers = await asyncio.gather(
                *(link_a.request("echo", str(number).encode(), timeout_s=60) for number in range(200))
            )
            assert answers == [str(number).encode() for number in range(200)]
            with pytest.raises(DataError, match="line 3 is not text"):
                await link_a.request("fail", b"", timeout_s=60)
            with pytest.raises(NetworkError, match="unexpected ZeroDivisionError"):
                await link_a.request("crash", b"", timeout_s=60)
            assert await link_a.request("echo", b"still there", timeout_s=60) == b"still there"
            with pytest.raises(ProtocolError, match="send it as bulk"):
                await link_a.request("echo", bytes(9 << 20), timeout_s=60)
            with pytest.raises(ConfigError, match="1 to 100 characters"):
                await link_a.notify("k" * 101, b"")
            assert (link_a.peer, link_a.peer_name, link_a.dialled) == (b.peer, "b", True)
            assert (link_b.peer, link_b.peer_name, link_b.dialled) == (a.peer, "a", False)

    go(main())


def test_timeout_and_cancellation_stop_the_peers_work(go: Any) -> None:
    async def main() -> None:
        async with pair() as (_, b, link_a, _):
            with pytest.raises(PeerTimeout, match=r"'sleep' within 0\.3 s"):
                await link_a.request("sleep", b"", timeout_s=0.3)
            await until(lambda: b.got.cancelled == 1)
            task = asyncio.create_task(link_a.request("sleep", b"", timeout_s=50))
            await until(lambda: b.got.events.count("request sleep") == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: b.got.cancelled == 2)
            assert await link_a.request("echo", b"x", timeout_s=60) == b"x"

    go(main())


def test_order_of_control_messages() -> None:
    """A request starts after all earlier notices have been handled, however slow they are."""

    async def main() -> None:
        async with pair() as (_, b, link_a, _):

            async def slow(payload: bytes) -> None:
                await asyncio.sleep(0.01 if payload == b"3" else 0)

            b.got.before_notice = slow
            for number in range(6):
                await link_a.notify("n", str(number).encode())
            await link_a.request("echo", b"", timeout_s=60)
            assert b.got.events == ["link", *["notice n"] * 6, "request echo"]
            assert [payload for _, payload in b.got.notices] == [b"0", b"1", b"2", b"3", b"4", b"5"]

    run(main())


def test_bulk_arrives_whole_and_in_order(go: Any) -> None:
    async def main() -> None:
        source = random.Random(5)
        async with pair() as (a, b, link_a, link_b):
            sizes = [0, 1, 4095, 16_384, 65_535, 65_536, 65_537, 300_000, 1 << 20, (1 << 20) + 1, 5_000_001]
            bodies = [source.randbytes(size) for size in sizes]
            await asyncio.gather(
                *(link_a.send_bulk("t", str(i).encode(), body) for i, body in enumerate(bodies)),
                *(link_b.send_bulk("u", b"", memoryview(bytearray(body))) for body in bodies),
            )
            await until(lambda: len(b.got.bulk) == len(a.got.bulk) == len(bodies))
            assert [int(header) for _, header, _ in b.got.bulk] == list(range(len(bodies)))
            assert [body for _, _, body in b.got.bulk] == bodies
            assert [body for _, _, body in a.got.bulk] == bodies
            numbers = memoryview(struct.pack("<4d", 1, 2, 3, 4)).cast("d", (2, 2))
            await link_a.send_bulk("t", b"", numbers)
            await until(lambda: len(b.got.bulk) > len(bodies))
            assert b.got.bulk[-1][2] == numbers.tobytes()

    go(main())


def test_statistics_agree_on_both_sides() -> None:
    async def main() -> None:
        async with pair() as (_, b, link_a, link_b):
            for _ in range(3):
                await link_a.send_bulk("t", b"12345", bytes(100_000))
            await link_a.request("echo", b"abc", timeout_s=60)
            await until(lambda: len(b.got.bulk) == 3)
            sent, received = link_a.statistics.sent["t"], link_b.statistics.received["t"]
            assert (sent.messages, sent.payload_bytes) == (3, 300_000)
            assert sent == received
            assert 300_000 < sent.wire_bytes < 300_000 * 1.003
            assert link_b.statistics.sent["echo"].payload_bytes == 3
            assert link_a.statistics.received["echo"].payload_bytes == 3
            for number in range(400):
                await link_a.notify(f"kind {number}", b"")
            await until(lambda: len(b.got.notices) == 400)
            assert len(link_b.statistics.received) <= 257

    run(main())


def test_slow_receiver_holds_the_sender_within_its_window() -> None:
    window = 1 << 20

    async def main() -> None:
        async with pair(limits=Limits(window_bytes=window)) as (_, b, link_a, link_b):
            gate = asyncio.Event()

            async def wait(_: bytes) -> None:
                await gate.wait()

            b.got.before_bulk = wait
            body = bytes(200_000)
            tasks = [asyncio.create_task(link_a.send_bulk("t", b"", body)) for _ in range(30)]
            await until(lambda: sum(task.done() for task in tasks) >= 4)
            await asyncio.sleep(0.3)
            assert sum(task.done() for task in tasks) <= window // len(body)
            received = link_b.statistics.received["t"].payload_bytes
            assert received <= window
            assert await link_a.request("echo", b"not blocked", timeout_s=60) == b"not blocked"
            gate.set()
            await asyncio.gather(*tasks)
            await until(lambda: len(b.got.bulk) == 30)
            await link_a.send_bulk("t", b"", bytes(5 * window))
            await until(lambda: len(b.got.bulk) == 31)

    run(main())


def test_window_bounds_the_number_of_tiny_messages() -> None:
    async def main() -> None:
        async with pair(limits=Limits(window_bytes=64 << 10)) as (_, b, link_a, link_b):
            gate = asyncio.Event()

            async def wait(_: bytes) -> None:
                await gate.wait()

            b.got.before_bulk = wait
            tasks = [asyncio.create_task(link_a.send_bulk("t", b"", b"x")) for _ in range(100)]
            most = (64 << 10) // LEAST_CHARGE
            await until(lambda: "t" in link_b.statistics.received and link_b.statistics.received["t"].messages >= most)
            await asyncio.sleep(0.2)
            assert link_b.statistics.received["t"].messages == most
            gate.set()
            await asyncio.gather(*tasks)

    run(main())


def test_cancelled_bulk_leaves_the_stream_intact() -> None:
    async def main() -> None:
        async with pair(limits=Limits(window_bytes=100_000)) as (_, b, link_a, _):
            gate = asyncio.Event()

            async def wait(_: bytes) -> None:
                await gate.wait()

            b.got.before_bulk = wait
            first = asyncio.create_task(link_a.send_bulk("t", b"first", bytes(80_000)))
            waiting = [asyncio.create_task(link_a.send_bulk("t", b"no", bytes(80_000))) for _ in range(3)]
            await asyncio.sleep(0.1)
            for task in waiting:
                task.cancel()
            last = asyncio.create_task(link_a.send_bulk("t", b"last", bytes(10_000_000)))
            await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(first, last)
            await until(lambda: b.got.bulk and b.got.bulk[-1][1] == b"last")
            assert len(b.got.bulk[-1][2]) == 10_000_000
            assert len(b.got.bulk) <= 3, "what was cancelled while it waited behind another is not sent"

    run(main())


def test_control_overtakes_bulk_that_saturates(go: Any) -> None:
    """Counted is what arrives of the bulk between a request and its answer: on a busy machine both take longer."""

    async def main() -> None:
        async with pair() as (_, b, link_a, link_b):

            async def drop(_: bytes) -> None:
                b.got.bulk.clear()

            b.got.before_bulk = drop
            body = bytes(256 << 10)
            stop = False

            async def flood() -> None:
                while not stop:
                    await link_a.send_bulk("t", b"", body)

            flooding = [asyncio.create_task(flood()) for _ in range(128)]
            await until(lambda: "t" in link_b.statistics.received)
            received = link_b.statistics.received["t"]
            overtaken = []
            for _ in range(60):
                before = received.payload_bytes
                await link_a.request("echo", b"x" * 100, timeout_s=100)
                overtaken.append(received.payload_bytes - before)
                await asyncio.sleep(0.005)
            assert received.payload_bytes > 100 << 20
            stop = True
            await asyncio.gather(*flooding)
            overtaken.sort()
            assert overtaken[57] < 16 << 20, "32 MiB wait at any time; about 2 MiB are under way in sockets"

    go(main())


def test_close_tells_the_peer_why_and_fails_what_waits(go: Any) -> None:
    async def main() -> None:
        async with pair() as (a, b, link_a, link_b):
            gate = asyncio.Event()

            async def wait(_: bytes) -> None:
                await gate.wait()

            b.got.before_bulk = wait
            waiting = asyncio.create_task(link_a.request("sleep", b"", timeout_s=50))
            back = asyncio.create_task(link_b.request("sleep", b"", timeout_s=50))
            bulk = [asyncio.create_task(link_a.send_bulk("t", b"", bytes(60 << 20))) for _ in range(2)]
            await until(lambda: b.got.events[-1:] == ["request sleep"])
            await link_a.close("job 7 is over")
            assert link_a.closed
            for task, says in ((waiting, "this side closed"), (back, "job 7 is over"), (bulk[1], "this side")):
                with pytest.raises(PeerLost, match=says):
                    await task
            await asyncio.gather(*bulk, return_exceptions=True)
            await until(lambda: a.got.closed and b.got.closed)
            assert "job 7 is over" in str(b.got.closed[0][1])
            assert b.got.cancelled == a.got.cancelled == 1
            assert a.endpoint.link(b.peer) is None
            for use in (link_a.notify("n", b""), link_a.send_bulk("t", b"", b""), link_a.ping(timeout_s=1)):
                with pytest.raises(PeerLost):
                    await use
            await link_a.close("again")
            again = await a.connect(b)
            assert await again.request("echo", b"anew", timeout_s=60) == b"anew"
            assert [*a.got.events] == ["link", "request sleep", "close", "link"]

    go(main())


def test_handler_may_close_its_own_link() -> None:
    async def main() -> None:
        async with pair() as (_, b, link_a, link_b):

            async def close(_: bytes) -> None:
                await link_b.close("enough")

            b.got.before_notice = close
            await link_a.notify("n", b"")
            await until(lambda: link_a.closed and b.got.closed)
            assert b.got.events.count("close") == 1

    run(main())


def test_a_connection_that_was_cut_is_not_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio's TLS transports forget their connection when they are closed twice; Python 3.11.2 then cannot abort."""
    again: list[object] = []
    close = sslproto._SSLProtocolTransport.close  # type: ignore[attr-defined]

    def counted(transport: Any) -> None:
        if transport.is_closing():
            again.append(transport)
        close(transport)

    monkeypatch.setattr(sslproto._SSLProtocolTransport, "close", counted)  # type: ignore[attr-defined]

    async def main() -> None:
        async with pair() as (a, b, link_a, link_b):
            link_a._control.abort(PeerLost("cut"))
            await until(lambda: link_a.closed and link_b.closed and bool(a.got.closed and b.got.closed))

    asyncio.run(main())
    assert not again


@pytest.mark.parametrize("error", [ProtocolError("shape [2] came with 3 bytes"), KeyError("bug")])
def test_failing_bulk_handler_ends_the_link(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with pair() as (a, b, link_a, _):

            async def refuse(_: bytes) -> None:
                raise error

            b.got.before_bulk = refuse
            await link_a.send_bulk("t", b"", b"x")
            await until(lambda: a.got.closed and b.got.closed)
            told = a.got.closed[0][1]
            if isinstance(error, ProtocolError):
                assert isinstance(told, ProtocolError)
                assert "came with 3 bytes" in str(told)
            else:
                assert "failed with KeyError" in str(told)
                assert "bug" not in str(told), "the peer learns nothing of this side's insides"

    with caplog.at_level(logging.CRITICAL):
        run(main())


CORRUPTIONS = {
    "no frame": (False, b"\x00" * 64, "do not begin a frame"),
    "bulk on control": (False, frame_prefix(FrameType.BULK, 4, 10) + bytes(14), "not allowed here"),
    "control on bulk": (True, frame_prefix(FrameType.PING, 2, 0) + b"\x91\x01", "not allowed here"),
    "greeting again": (False, frame_prefix(FrameType.HELLO, 1, 0) + b"\x80", "not allowed here"),
    "malformed header": (False, frame_prefix(FrameType.NOTICE, 3, 0) + b"\xc1\xc1\xc1", "malformed Notice"),
    "too long": (False, frame_prefix(FrameType.NOTICE, 3, 9 << 20), "passes the limit"),
    "huge": (True, frame_prefix(FrameType.BULK, 3, 1 << 60), "passes the limit"),
    "credit out of nothing": (False, frame_prefix(FrameType.CREDIT, 2, 0) + b"\x91\x05", "credit"),
    "negative credit": (False, frame_prefix(FrameType.CREDIT, 2, 0) + b"\x91\xff", "credit"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corrupt_stream_ends_its_link_and_nothing_else(case: str, go: Any) -> None:
    on_bulk, junk, says = CORRUPTIONS[case]

    async def main() -> None:
        async with pair() as (a, b, link_a, link_b):
            other = Node("c")
            link_c = await other.connect(b)
            connection = link_a._bulk if on_bulk else link_a._control
            connection._write(junk)
            await until(lambda: a.got.closed and b.got.closed)
            assert isinstance(b.got.closed[0][1], ProtocolError)
            assert says in str(b.got.closed[0][1])
            assert isinstance(a.got.closed[0][1], ProtocolError), "the peer is told what it did"
            assert link_b.closed
            assert await link_c.request("echo", b"fine", timeout_s=60) == b"fine"
            assert await (await a.connect(b)).request("echo", b"fine", timeout_s=60) == b"fine"
            await other.endpoint.close()

    go(main())


def test_overdrawn_window_is_refused_before_the_body_comes() -> None:
    async def main() -> None:
        async with pair(limits=Limits(window_bytes=100_000)) as (_, b, link_a, link_b):
            gate = asyncio.Event()

            async def wait(_: bytes) -> None:
                await gate.wait()

            b.got.before_bulk = wait
            await link_a.send_bulk("t", b"", bytes(90_000))
            header = encode(Bulk("t", b""))
            link_a._bulk._write(frame_prefix(FrameType.BULK, len(header), 50_000) + header)
            await until(lambda: b.got.closed)
            assert "overdrew its window" in str(b.got.closed[0][1])
            assert link_b._bulk._decoder.held_bytes == 0

    run(main())


def test_too_many_requests_are_answered_with_an_error() -> None:
    async def main() -> None:
        async with pair(limits=Limits(open_requests=5)) as (_, b, link_a, _):
            tasks = [asyncio.create_task(link_a.request("sleep", b"", timeout_s=60)) for _ in range(5)]
            await until(lambda: b.got.events.count("request sleep") == 5)
            with pytest.raises(NetworkError, match="5 requests of this peer are unanswered"):
                await link_a.request("echo", b"", timeout_s=60)
            for task in tasks:
                task.cancel()
            await until(lambda: b.got.cancelled == 5)
            await link_a.request("echo", b"", timeout_s=60)

    run(main())


def test_flood_of_notices_is_held_back_and_none_is_lost() -> None:
    limits = Limits(queued_messages=10)

    async def main() -> None:
        async with pair(limits=limits) as (_, b, link_a, link_b):
            gate = asyncio.Event()

            async def wait(_: bytes) -> None:
                await gate.wait()

            b.got.before_notice = wait
            payload = bytes(100_000)
            sending = asyncio.create_task(_send_notices(link_a, payload, 300))
            await asyncio.sleep(0.3)
            assert not sending.done(), "30 MB do not fit between the two"
            assert len(link_b._inbox) < 20
            gate.set()
            await asyncio.wait_for(sending, 100)
            await until(lambda: len(b.got.notices) == 300)
            assert not link_b.closed

    async def _send_notices(link: Any, payload: bytes, count: int) -> None:
        for _ in range(count):
            await link.notify("n", payload)

    run(main())


def test_idle_link_lives_by_its_pings() -> None:
    """That silence ends a link is shown with a stopped process, in test_processes.py."""
    limits = Limits(silence_s=0.4, ping_interval_s=0.1)

    async def main() -> None:
        async with pair(limits=limits) as (a, b, link_a, _):
            await asyncio.sleep(1.5)
            assert not link_a.closed
            assert not a.got.closed + b.got.closed
            assert link_a.rtt_s is not None
            assert link_a.rtt_s > 0

    run(main())


def test_own_stall_is_not_held_against_the_peer() -> None:
    limits = Limits(silence_s=0.5, ping_interval_s=0.1)

    async def main() -> None:
        async with pair(limits=limits) as (a, _, link_a, _):
            await asyncio.sleep(0.2)
            time.sleep(2.5)  # noqa: ASYNC251 (the loop is meant to be blocked)
            await asyncio.sleep(0.5)
            assert not a.got.closed
            assert await link_a.request("echo", b"x", timeout_s=60) == b"x"

    run(main())


def test_nothing_is_left_after_close(go: Any) -> None:
    async def main() -> None:
        counts = []
        for _ in range(3):
            async with pair() as (_, _, link_a, _):
                await link_a.send_bulk("t", b"", bytes(1 << 20))
                waiting = asyncio.create_task(link_a.request("sleep", b"", timeout_s=60))
                await asyncio.sleep(0.01)
            with pytest.raises(PeerLost):
                await waiting
            await asyncio.sleep(0.05)
            gc.collect()
            counts.append(_open_files())
            assert asyncio.all_tasks() == {asyncio.current_task()}
        assert counts[2] <= counts[0]

    go(main())


def _open_files() -> int:
    folder = "/proc/self/fd"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0  # noqa: PTH112, PTH208


def test_credit_accounts_agree() -> None:
    async def main() -> None:
        send, receive = SendCredit(10_000), ReceiveCredit(10_000)
        for size in (1, 5000, 50_000):
            await asyncio.wait_for(send.take(min(max(size, 4096), 10_000)), 1)
            receive.admit(size)
            send.give(receive.finish(size))
            assert (send.free_bytes, receive.held_bytes) == (10_000, 0)
        receive.admit(6000)
        with pytest.raises(ProtocolError, match="overdrew"):
            receive.admit(5000)
        with pytest.raises(ProtocolError, match="are owed"):
            send.give(1)

    asyncio.run(main())
