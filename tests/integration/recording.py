"""Pools whose processes record every frame that reaches them, decrypted.

Run as a program this file is `fusionai` with a recorder below its link layer: `python recording.py FILE join ...`.
Nothing can reach a process past it: each connection has one decoder, which all decrypted bytes go through.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fusionai.network.framing import PREFIX_BYTES, Frame, FrameDecoder, FrameType
from fusionai.network.messages import Bulk, Call, Notice, decode
from fusionai.owner.local_pool import LocalPool
from quick_pool import keep_measurements, start

_RECORD = struct.Struct("<QQBIQ?")
_STAGING_BYTES = 64 << 10
"""What a decoder may have taken in beyond the end of a frame."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One frame that a process received."""

    type: FrameType
    header: bytes
    body: bytes
    """Empty for the zeros of a link probe, which are counted but not kept."""

    @property
    def kind(self) -> str:
        """The upper layer's name for it, such as "train.boundary"; empty for the link's own frames and answers."""
        match self.type:
            case FrameType.BULK:
                return decode(Bulk, self.header).kind
            case FrameType.REQUEST:
                return decode(Call, self.header).kind
            case FrameType.NOTICE:
                return decode(Notice, self.header).kind
            case _:
                return ""

    @property
    def inner_header(self) -> bytes:
        """The upper layer's header of a bulk message."""
        return decode(Bulk, self.header).header


class Recording:
    """Reads the file of one process, in portions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._framed: dict[int, int] = {}
        """By connection: bytes of all frames so far."""

    def take(self) -> list[Recorded]:
        """Return the frames since the last call, after checking that nothing is missing between them."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        found, start = [], 0
        while start + _RECORD.size <= len(data):
            connection, arrived, kind, header_bytes, body_bytes, zeros = _RECORD.unpack_from(data, start)
            header_at = start + _RECORD.size
            body_at = header_at + header_bytes
            end = body_at + (0 if zeros else body_bytes)
            if end > len(data):
                break
            framed = self._framed.get(connection, 0) + PREFIX_BYTES + header_bytes + body_bytes
            assert 0 <= arrived - framed <= _STAGING_BYTES, "bytes arrived that are in no recorded frame"
            self._framed[connection] = framed
            found.append(Recorded(FrameType(kind), data[header_at:body_at], data[body_at:end]))
            start = end
        self._offset += start
        return found


class RecordedPool(LocalPool):
    """A local pool, its broker included, of recording processes."""

    def recordings(self) -> dict[str, Recording]:
        """Return what each process records, by name."""
        return {name: Recording(self._path(name)) for name in self.pids}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.frames"

    def _start_command(self, name: str, arguments: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
        if arguments[0] == "join":
            keep_measurements(self.folder / name)
        words = [str(self._path(name)), *arguments]
        return start(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, script=Path(__file__))


def record_frames(path: Path) -> None:
    """Write every frame that any connection of this process receives to `path`, from now on."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
    advance, take = FrameDecoder.advance, FrameDecoder.next
    connections: dict[FrameDecoder, list[int]] = {}

    def recording_advance(self: FrameDecoder, count: int) -> None:
        entry = connections.setdefault(self, [len(connections), 0])
        entry[1] += count
        advance(self, count)

    def recording_next(self: FrameDecoder) -> Frame | None:
        frame = take(self)
        if frame is not None:
            number, arrived = connections[self]
            zeros = len(frame.body) > _STAGING_BYTES and frame.body.count(0) == len(frame.body)
            record = _RECORD.pack(number, arrived, frame.type, len(frame.header), len(frame.body), zeros)
            view = memoryview(b"".join((record, frame.header, b"" if zeros else frame.body)))
            while view:
                view = view[os.write(file, view) :]
        return frame

    # The class, not its instances: connections made before or after are all recorded.
    FrameDecoder.advance = recording_advance  # type: ignore[method-assign]
    FrameDecoder.next = recording_next  # type: ignore[method-assign]


if __name__ == "__main__":
    from fusionai.cli.main import main

    record_frames(Path(sys.argv[1]))
    raise SystemExit(main(sys.argv[2:]))
