"""Throughput and latency of FusionAI's links against raw sockets and gRPC, interleaved in one run.

    python benchmarks/network.py [--json] [--rounds N]

Two processes on loopback: a client (this one) and a server. Every round visits every contender, so that what else the
machine does hits all alike. Throughput: messages of one size, from the first byte sent until the receiver's word that
it has all of them in memory of their own. Latency: a 100-byte question and its 100-byte answer, one at a time.

Contenders with the same protection: TLS 1.3 with AES-GCM; those without: TCP alone. Both raw ones and gRPC use what
their users use by default, with message limits lifted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from network_contenders import (
    Blocking,
    Contender,
    Fusion,
    Grpc,
    LoopThread,
    Streams,
    make_certificate,
    server_main,
)

SIZES_BYTES = (16 << 10, 256 << 10, 4 << 20, 32 << 20)
ROUND_BYTES = 64 << 20
MOST_MESSAGES = 1024
QUESTIONS = 200


def latencies_s(contender: Contender, thread: LoopThread) -> list[float]:
    if isinstance(contender, Streams | Fusion):
        return thread.run(contender.ask_many(QUESTIONS))
    seconds = []
    for _ in range(QUESTIONS):
        began_s = time.perf_counter()
        contender.ask()
        seconds.append(time.perf_counter() - began_s)
    return seconds


def measure(contenders: list[Contender], thread: LoopThread, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each contender: medians and spreads."""
    rates: dict[tuple[str, int], list[float]] = {}
    delays: dict[str, list[float]] = {}
    bodies = {size: os.urandom(size) for size in SIZES_BYTES}
    for turn in range(rounds + 1):
        for size in SIZES_BYTES:
            count = min(max(1, ROUND_BYTES // size), MOST_MESSAGES)
            for contender in contenders:
                began_s = time.perf_counter()
                contender.send(bodies[size], count)
                if turn:  # the first round warms up
                    took_s = time.perf_counter() - began_s
                    rates.setdefault((contender.title, size), []).append(count * size / took_s / 1e6)
        for contender in contenders:
            seconds = latencies_s(contender, thread)
            if turn:
                delays.setdefault(contender.title, []).extend(seconds)
    rows = []
    for contender in contenders:
        ordered = sorted(delays[contender.title])
        row: dict[str, Any] = {"name": contender.title, "encrypted": contender.encrypted}
        row["latency_us"] = {
            "median": statistics.median(ordered) * 1e6,
            "p95": ordered[int(len(ordered) * 0.95)] * 1e6,
        }
        row["mb_per_s"] = {
            str(size): {
                "median": statistics.median(values := rates[contender.title, size]),
                "min": min(values),
                "max": max(values),
            }
            for size in SIZES_BYTES
        }
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    titles = [f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB" for size in SIZES_BYTES]
    print("MB/s (10^6), median [min-max] by message size; latency of 100 bytes and back")
    print(f"{'':26}" + "".join(f"{title:>18}" for title in titles) + f"{'median us':>12}{'p95 us':>9}")
    for row in rows:
        cells = ""
        for size in SIZES_BYTES:
            rate = row["mb_per_s"][str(size)]
            cells += f"{rate['median']:7.0f} [{rate['min']:.0f}-{rate['max']:.0f}]".rjust(18)
        latency = row["latency_us"]
        print(f"{row['name']:26}{cells}{latency['median']:12.0f}{latency['p95']:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
    parser.add_argument("--server", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server is not None:
        server_main(args.server)
    with tempfile.TemporaryDirectory() as folder:
        pem = make_certificate(Path(folder))
        command = [sys.executable, str(Path(__file__).resolve()), "--server", str(pem)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            ports = json.loads(child.stdout.readline())
            context = ssl.create_default_context(cafile=str(pem))
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            thread = LoopThread()
            contenders: list[Contender] = [
                Fusion(*ports["fusionai"], thread),
                Grpc(ports["grpc_tls"], pem.read_bytes()),
                Blocking(ports["blocking_tls"], context),
                Grpc(ports["grpc"], None),
                Streams(ports["streams"], thread),
                Blocking(ports["blocking"], None),
            ]
            rows = measure(contenders, thread, args.rounds)
        finally:
            child.kill()
            child.communicate()
    report = {
        "contenders": rows,
        "rounds": args.rounds,
        "lab": False,
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "openssl": ssl.OPENSSL_VERSION,
            "grpc": grpc.__version__,
        },
    }
    print_table(rows)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
