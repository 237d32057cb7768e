"""Headers: round trips, tolerance for newer minor versions, and rejection of everything else."""

from __future__ import annotations

import random

import msgspec
import pytest

from fusionai.errors import DataError, NetworkError, ProtocolError
from fusionai.network.messages import (
    Bulk,
    Call,
    Credit,
    Failure,
    Hello,
    LinkRefused,
    Notice,
    PeerVersion,
    Ping,
    Reply,
    decode,
    encode,
    error_from,
    error_name,
)

HELLO = Hello(
    release=PeerVersion(package="9.9"),
    channel="control",
    session=bytes(16),
    instance=bytes(8),
    name="n",
    window_bytes=1,
    control_payload_bytes=2,
    bulk_body_bytes=3,
    credential=b"c",
)
ALL = [
    HELLO,
    LinkRefused(error="TokenError", text="late", release=PeerVersion()),
    Call(7, "kind"),
    Reply(7),
    Failure(7, "DataError", "text"),
    Notice("kind"),
    Bulk("kind", b"header"),
    Credit(5),
    Ping(1),
]


@pytest.mark.parametrize("header", ALL, ids=lambda header: type(header).__name__)
def test_round_trip(header: msgspec.Struct) -> None:
    assert decode(type(header), encode(header)) == header


def test_fields_of_a_newer_minor_version_are_skipped() -> None:
    newer = msgspec.msgpack.encode([7, "kind", {"priority": 3}])
    assert decode(Call, newer) == Call(7, "kind")
    greeting = msgspec.msgpack.decode(encode(HELLO))
    greeting["compression"] = ["zstd"]
    greeting["release"]["minor"] = 9
    assert decode(Hello, msgspec.msgpack.encode(greeting)).release.minor == 9


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (Call, b""),
        (Call, b"\xc1"),
        (Call, msgspec.msgpack.encode(["7", "kind"])),
        (Call, msgspec.msgpack.encode([7, ""])),
        (Notice, msgspec.msgpack.encode(["k" * 101])),
        (Bulk, msgspec.msgpack.encode(["kind"])),
        (Hello, msgspec.msgpack.encode({"release": {}})),
        (Credit, msgspec.msgpack.encode([1.5])),
    ],
)
def test_malformed_headers_are_protocol_errors(kind: type[msgspec.Struct], raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(kind, raw)


def test_fuzzed_headers_raise_nothing_but_protocol_errors() -> None:
    source = random.Random(3)
    for _ in range(10_000):
        header = source.choice(ALL)
        raw = bytearray(encode(header))
        for _ in range(source.randrange(1, 4)):
            raw[source.randrange(len(raw))] = source.randrange(256)
        try:
            decode(type(header), bytes(raw[: source.randrange(len(raw) + 1)]))
        except ProtocolError:
            pass


def test_only_errors_of_our_own_cross_the_wire() -> None:
    class Inner(DataError):
        pass

    assert error_name(Inner("x")) == "DataError"
    assert type(error_from("DataError", "x")) is DataError
    for name in ("SystemExit", "KeyboardInterrupt", "ValueError", "annotations", "__builtins__"):
        assert type(error_from(name, "x")) is NetworkError
    assert len(str(error_from("DataError", "x" * 100_000))) == 4000
