"""Peers in processes of their own: killed, stopped, and at full speed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network_nodes import Node, until

from fusionai.errors import PeerLost
from fusionai.network.identity import PeerId
from fusionai.network.limits import Limits
from fusionai.network.loop import run

PEER = """
import asyncio, hashlib, sys
from fusionai.network.loop import run
from network_nodes import Node

async def main():
    node = await Node("child").listen()
    async def answer(link, kind, payload):
        while len(node.got.bulk) < int(payload or b"0"):
            await asyncio.sleep(0.001)
        return b"".join(hashlib.sha256(body).digest() for _, _, body in node.got.bulk)
    node.got.on_request = answer
    print(node.peer, node.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)

run(main())
"""


@contextlib.contextmanager
def child() -> Iterator[tuple[subprocess.Popen[str], PeerId, str]]:
    """A listening peer in another process: with its id and address."""
    here = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r})\n{PEER}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        peer, address = process.stdout.readline().split()
        yield process, PeerId(peer), address
    finally:
        process.kill()
        process.communicate()


def test_bulk_between_processes_is_exact() -> None:
    async def main() -> None:
        source = random.Random(6)
        bodies = [source.randbytes(size) for size in (20 << 20, 1, 3 << 20)]
        with child() as (_, peer, address):
            node = Node("parent")
            link = await node.endpoint.connect(peer, [address], timeout_s=60)
            for body in bodies:
                await link.send_bulk("t", b"", body)
            digests = await link.request("digests", b"3", timeout_s=60)
            assert digests == b"".join(hashlib.sha256(body).digest() for body in bodies)
            await node.endpoint.close()

    run(main())


@pytest.mark.parametrize("loop", [run, asyncio.run], ids=["fastest", "asyncio"])
def test_killed_peer_is_seen_at_once(loop: object) -> None:
    async def main() -> None:
        with child() as (process, peer, address):
            node = Node("parent")
            link = await node.endpoint.connect(peer, [address], timeout_s=60)
            # More than any machine sends before the kill, or the answer comes first.
            waiting = asyncio.create_task(link.request("digests", b"1000000", timeout_s=60))
            bulk = asyncio.create_task(_flood(link))
            await asyncio.sleep(0.2)
            process.kill()
            with pytest.raises(PeerLost):
                await waiting
            with pytest.raises(PeerLost):
                await bulk
            await until(lambda: node.got.closed, 60)
            assert "silent" not in str(node.got.closed[0][1]), "the reset tells it, long before the patience ends"
            assert node.endpoint.link(peer) is None
            await node.endpoint.close()

    loop(main())  # type: ignore[operator]


async def _flood(link: object) -> None:
    body = bytes(1 << 20)
    while True:
        await link.send_bulk("t", b"", body)  # type: ignore[attr-defined]


@pytest.mark.skipif(os.name != "posix", reason="stops a process by a POSIX signal")
def test_stopped_peer_is_lost_by_its_silence_and_not_before() -> None:
    limits = Limits(silence_s=1.5, ping_interval_s=0.2)

    async def main() -> None:
        with child() as (process, peer, address):
            node = Node("parent", limits=limits)
            link = await node.endpoint.connect(peer, [address], timeout_s=60)
            await asyncio.sleep(0.5)
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.7)
            process.send_signal(signal.SIGCONT)
            await link.request("digests", b"", timeout_s=60)
            assert not link.closed, "a pause shorter than the patience is forgiven"
            process.send_signal(signal.SIGSTOP)
            began_s = time.monotonic()
            await until(lambda: node.got.closed, 60)
            assert time.monotonic() - began_s > 1
            assert "silent" in str(node.got.closed[0][1])
            process.send_signal(signal.SIGCONT)
            await node.endpoint.close()

    run(main())


@pytest.mark.skipif(os.name != "posix", reason="reads /proc or resource usage")
def test_slow_consumer_does_not_grow_the_sender() -> None:
    """A sender far ahead of a consumer that never finishes keeps its memory."""
    import psutil

    async def main() -> None:
        with child() as (process, peer, address):
            node = Node("parent", limits=Limits(silence_s=60))
            link = await node.endpoint.connect(peer, [address], timeout_s=60)
            body = bytes(32 << 20)
            process.send_signal(signal.SIGSTOP)
            before_bytes = psutil.Process().memory_info().rss
            sending = [asyncio.create_task(link.send_bulk("t", b"", body)) for _ in range(40)]
            await asyncio.sleep(0.5)
            grown_bytes = psutil.Process().memory_info().rss - before_bytes
            assert grown_bytes < 16 << 20
            assert not any(task.done() for task in sending)
            process.send_signal(signal.SIGCONT)
            process.kill()
            await asyncio.gather(*sending, return_exceptions=True)
            await node.endpoint.close()

    run(main())
