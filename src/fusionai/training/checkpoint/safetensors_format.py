"""The safetensors file format: eight bytes of header length, a JSON header, then the tensors without gaps.

This module writes the format itself, because the safetensors library needs all tensors of a file at once, but the
tensors of a checkpoint arrive one at a time, in any order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from fusionai.errors import CheckpointError
from fusionai.tensor import ITEM_BYTES, DType, tensor_bytes

HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library accepts."""

_LENGTH = struct.Struct("<Q")

_WORDS: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {word: dtype for dtype, word in _WORDS.items()}
assert _WORDS.keys() == ITEM_BYTES.keys()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of a stored tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a tensor in a file."""

    word: str
    """Element type in the format's spelling. FusionAI need not know it."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file, counted with the header."""
    stop: int

    @property
    def dtype(self) -> DType | None:
        """Element type, or None where FusionAI does not know it."""
        return cast("DType | None", _DTYPES.get(self.word))


class _TensorEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def make_header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, Place]]:
    """Return the bytes before the tensors, and the place of each tensor.

    Tensors with larger elements come first, so that each starts at a multiple of its element's size. Raises
    ValueError when two tensors have one name.
    """
    relative: dict[str, Place] = {}
    start = 0
    for spec in sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtype]):
        if spec.name in relative or spec.name == "__metadata__":
            raise ValueError(f"the tensor name {spec.name!r} is given twice, or is the format's own")
        relative[spec.name] = Place(_WORDS[spec.dtype], spec.shape, start, start + spec.nbytes)
        start += spec.nbytes
    entries = {
        name: _TensorEntry(place.word, list(place.shape), (place.start, place.stop)) for name, place in relative.items()
    }
    # transformers refuses a file that does not say which framework's layout its tensors have.
    header = msgspec.json.encode({"__metadata__": {"format": "pt"}} | entries)
    header += b" " * (-len(header) % 8)
    if len(header) > HEADER_BYTES:
        raise ValueError(f"{len(specs):,} tensors make a header of {len(header):,} bytes; use more files")
    base = _LENGTH.size + len(header)
    places = {
        name: Place(place.word, place.shape, base + place.start, base + place.stop) for name, place in relative.items()
    }
    return _LENGTH.pack(len(header)) + header, places


def read_header(path: Path) -> dict[str, Place]:
    """Return the place of each tensor of a file.

    Raises CheckpointError when the file is missing or cut short, or its header is damaged. A damaged header cannot make
    it allocate much memory.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else -1
            if not 2 <= length <= min(HEADER_BYTES, size - _LENGTH.size):
                raise CheckpointError(f"{path} is damaged: it is no safetensors file, or it was cut short")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        found = {name: msgspec.json.decode(raw, type=_TensorEntry) for name, raw in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not valid: {error}") from error
    base = _LENGTH.size + length
    places = {}
    for name, entry in found.items():
        start, stop = entry.data_offsets
        fits = 0 <= start <= stop <= size - base and all(axis >= 0 for axis in entry.shape)
        if fits and entry.dtype in _DTYPES:
            fits = stop - start == ITEM_BYTES[_DTYPES[entry.dtype]] * math.prod(entry.shape)
        if not fits:
            raise CheckpointError(
                f"{path} is damaged: tensor {name!r} of {entry.dtype}{entry.shape} is said to stand at bytes "
                f"{start:,} to {stop:,} of {size - base:,}"
            )
        places[name] = Place(entry.dtype, tuple(entry.shape), base + start, base + stop)
    return places
