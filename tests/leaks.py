"""Looks for token ids and labels in recorded bytes, in every form that they might plausibly travel in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import torch

FRAGMENT = 8
"""Values in a row that make a find. In the shortest form 8 bytes: a few thousand such rows and a few megabytes of
noise agree somewhere once in 10^8 searches."""

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IGNORED = -100
"""Label of what does not count."""


def encodings(values: Sequence[int]) -> dict[str, bytes]:
    """Return the bytes of a row of numbers by the name of the form; values beyond a form's range wrap."""
    found = {}
    for dtype in (*_WHOLE, *_FLOATING):
        row = torch.tensor(values, dtype=torch.int64).to(dtype)
        raw = row.view(torch.uint8).reshape(len(values), -1)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} little-endian"] = raw.numpy().tobytes()
        if dtype.itemsize > 1:
            found[f"{name} big-endian"] = raw.flip(1).contiguous().numpy().tobytes()
    found["MessagePack"] = b"".join(msgspec.msgpack.encode(value) for value in values)
    found["JSON"] = json.dumps(list(values)).encode()[1:-1]
    found["compact JSON"] = json.dumps(list(values), separators=(",", ":")).encode()[1:-1]
    found["text"] = " ".join(map(str, values)).encode()
    return found


def fragments(values: torch.Tensor) -> Iterator[list[int]]:
    """Yield rows to look for: cut so that 15 neighbours of a sequence hold one, wherever what was sent of it begins.

    The sequences are a batch's, with its axes swapped too, those of the values that count, and the sorted set of these.
    """
    sequences = [*values.tolist(), values.T.flatten().tolist()]
    counted = values[values != IGNORED]
    sequences += [counted.tolist(), counted.unique().tolist(), counted.unique().flip(0).tolist()]
    for sequence in sequences:
        for start in range(0, len(sequence) - FRAGMENT + 1, FRAGMENT):
            fragment = sequence[start : start + FRAGMENT]
            # Next to nothing but ignored labels says nothing, and would be found in any padding.
            if len(set(fragment)) > 2:
                yield fragment


def leaks(haystack: bytes, batch: Mapping[str, torch.Tensor]) -> dict[str, set[str]]:
    """Return the forms in which `haystack` shows values of a microbatch, by the input's name; without it, nothing."""
    needles: dict[bytes, tuple[str, str]] = {}
    for name, values in batch.items():
        for fragment in fragments(values):
            needles |= {needle: (name, form) for form, needle in encodings(fragment).items()}
    found: dict[str, set[str]] = {}
    for name, form in (needles[needle] for needle in _occurring(haystack, list(needles))):
        found.setdefault(name, set()).add(form)
    return found


def _occurring(haystack: bytes, needles: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the needles, of at least 8 bytes each, that occur: those alone are tried whose first 8 bytes do.

    Trying them all takes twenty times as long.
    """
    starts = np.array([int.from_bytes(needle[:8], "little") for needle in needles], dtype=np.uint64)
    occurs = np.zeros(len(needles), dtype=bool)
    for shift in range(8):
        count = (len(haystack) - shift) // 8
        if count > 0:
            occurs |= np.isin(starts, np.frombuffer(haystack, dtype="<u8", count=count, offset=shift))
    for place in np.flatnonzero(occurs):
        if needles[place] in haystack:
            yield needles[place]
