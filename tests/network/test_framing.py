"""The frame decoder against every way of cutting a stream, and against streams made to break it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionai.errors import ProtocolError
from fusionai.network.framing import PREFIX_BYTES, Frame, FrameDecoder, FrameType, frame_prefix

LIMITS = {FrameType.NOTICE: 1 << 16, FrameType.BULK: 4 << 20, FrameType.PING: 0}
HEADER_LIMIT = 1024


def encoded(kind: int, header: bytes, body: bytes) -> bytes:
    """A frame written by hand from the documented layout, independently of `frame_prefix`."""
    return bytes([0xFA, kind, 0, 0]) + len(header).to_bytes(4, "big") + len(body).to_bytes(8, "big") + header + body


def decoder(**options: object) -> FrameDecoder:
    return FrameDecoder(LIMITS, HEADER_LIMIT, **options)  # type: ignore[arg-type]


def feed(target: FrameDecoder, data: bytes, steps: Sequence[int] = (1 << 30,)) -> list[Frame]:
    """Feed by filling the decoder's buffer as a socket would: in given amounts, or as much as it takes."""
    frames, position, turn = [], 0, 0
    while position < len(data):
        buffer = target.buffer()
        count = min(len(buffer), steps[turn % len(steps)], len(data) - position)
        buffer[:count] = data[position : position + count]
        del buffer
        position, turn = position + count, turn + 1
        target.advance(count)
        while (frame := target.next()) is not None:
            frames.append(frame)
    return frames


def test_layout_is_the_documented_one() -> None:
    assert frame_prefix(FrameType.BULK, 3, 5) + b"abcdefgh" == encoded(9, b"abc", b"defgh")
    assert PREFIX_BYTES == 16


@settings(max_examples=150, deadline=None)
@given(
    messages=st.lists(
        st.tuples(
            st.sampled_from([FrameType.NOTICE, FrameType.BULK]),
            st.binary(max_size=200),
            st.one_of(st.binary(max_size=300), st.integers(0, 400_000)),
        ),
        min_size=1,
        max_size=5,
    ),
    steps=st.lists(st.integers(1, 200_000), min_size=1, max_size=5),
)
def test_any_cutting_of_the_stream_gives_the_same_frames(
    messages: list[tuple[FrameType, bytes, bytes | int]], steps: list[int]
) -> None:
    random_bytes = random.Random(0).randbytes(400_000)
    plain = []
    for kind, header, body in messages:
        body = random_bytes[:body] if isinstance(body, int) else body
        plain.append((FrameType.BULK if len(body) > 1 << 16 else kind, header, body))
    stream = b"".join(encoded(kind, header, body) for kind, header, body in plain)
    if min(steps) < 50 and len(stream) > 20_000:
        steps = [step * 997 for step in steps]
    found = feed(decoder(), stream, steps)
    assert [(frame.type, frame.header, bytes(frame.body)) for frame in found] == plain
    assert sum(frame.wire_bytes for frame in found) == len(stream)


def test_large_body_is_read_in_place() -> None:
    body = random.Random(1).randbytes(3 << 20)
    target = decoder()
    prefix = encoded(9, b"h", body)[: PREFIX_BYTES + 1]
    assert feed(target, prefix) == []
    buffer = target.buffer()
    assert len(buffer) == 1 << 20, "the body's first step itself is lent out, not the staging buffer"
    del buffer
    (frame,) = feed(target, body)
    assert frame.body == body


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n", "do not begin a frame"),
        (bytes([0xFA, 9, 1, 0]) + bytes(12), "do not begin a frame"),
        (encoded(200, b"", b""), "type 200 is unknown"),
        (encoded(1, b"", b""), "HELLO frame is not allowed"),
        (encoded(8, bytes(1025), b"")[:16], "header of 1,025 bytes passes the limit of 1,024"),
        (encoded(11, b"", b"x"), "PING body of 1 bytes passes the limit of 0"),
        (
            bytes([0xFA, 9, 0, 0]) + bytes(4) + b"\xff" * 8,
            "BULK body of 18,446,744,073,709,551,615 bytes passes the limit",
        ),
    ],
)
def test_refusals_name_what_was_found(stream: bytes, says: str) -> None:
    target = decoder()
    with pytest.raises(ProtocolError, match=says):
        feed(target, stream)
    with pytest.raises(ProtocolError, match="already known to be corrupt"):
        target.next()


def test_owner_refuses_a_body_before_it_is_allocated() -> None:
    asked = []

    def admit(kind: FrameType, header: bytes, body_bytes: int) -> None:
        asked.append((kind, header, body_bytes))
        raise ProtocolError("no credit")

    target = decoder(admit=admit)
    with pytest.raises(ProtocolError, match="no credit"):
        feed(target, encoded(9, b"head", b"")[:8] + (4 << 20).to_bytes(8, "big") + b"head")
    assert asked == [(FrameType.BULK, b"head", 4 << 20)]
    assert target.held_bytes == 0


def test_memory_follows_the_bytes_that_arrive() -> None:
    limit = 1 << 40
    target = FrameDecoder({FrameType.BULK: limit}, HEADER_LIMIT)
    tracemalloc.start()
    try:
        feed(target, bytes([0xFA, 9, 0, 0]) + bytes(4) + limit.to_bytes(8, "big"))
        for arrived_mib in range(1, 40):
            feed(target, bytes(1 << 20))
            assert target.held_bytes <= 2 * (arrived_mib << 20) + (1 << 20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2.5 * (40 << 20)


def test_fuzz_ten_thousand_malformed_streams() -> None:
    """Mutated and random streams end in frames within the limits or a ProtocolError, and never in much memory."""
    source = random.Random(20)
    valid = [
        encoded(8, source.randbytes(20), source.randbytes(100)),
        encoded(9, source.randbytes(40), source.randbytes(3000)),
        encoded(11, b"\x91\x01", b""),
    ]
    refused = 0
    tracemalloc.start()
    try:
        for turn in range(10_000):
            if turn % 4 == 0:
                stream = source.randbytes(source.randrange(1, 200))
            else:
                mutable = bytearray(b"".join(source.choices(valid, k=3)))
                for _ in range(source.randrange(1, 6)):
                    place = source.randrange(len(mutable))
                    if source.random() < 0.5:
                        mutable[place] = source.randrange(256)
                    elif source.random() < 0.5:
                        del mutable[place : place + source.randrange(1, 30)]
                    else:
                        mutable[place:place] = source.randbytes(source.randrange(1, 30))
                    if not mutable:
                        mutable += b"\0"
                stream = bytes(mutable)
            target = decoder()
            try:
                for frame in feed(target, stream, [source.randrange(1, 5000)]):
                    assert len(frame.body) <= LIMITS[frame.type]
                    assert len(frame.header) <= HEADER_LIMIT
            except ProtocolError:
                refused += 1
            assert target.held_bytes <= 1 << 20
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused > 5000
    assert peak_bytes < 8 << 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_arbitrary_bytes_raise_nothing_but_protocol_errors(data: bytes, steps: list[int]) -> None:
    try:
        feed(decoder(), b"\xfa" + data, steps)
    except ProtocolError:
        pass
