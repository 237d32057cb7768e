"""Random numbers as a pure function of their purpose: no state, and any element can be computed directly.

The bits come from Philox and BLAKE2 alone, which are the same on every machine and in every version of numpy.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
"""Rounds of the Feistel network. Four already give a good permutation; two more cost almost nothing. With fewer than
four, the order of blocks would show patterns."""


def _key(*purpose: int | str) -> bytes:
    """Return 16 bytes that depend on the purpose of the random numbers, such as ("mask", seed, step)."""
    return hashlib.blake2b("/".join(map(str, purpose)).encode(), digest_size=16).digest()


def uniform_bits(count: int, *purpose: int | str) -> npt.NDArray[np.uint64]:
    """Return `count` random 64-bit numbers that depend on `purpose` only."""
    key = np.frombuffer(_key(*purpose), dtype="<u8")
    return np.random.Philox(key=key.astype(np.uint64)).random_raw(count)


class Permutation:
    """A pseudo-random order of 0..size-1 that takes no memory: a Feistel network, repeated until inside the range."""

    def __init__(self, size: int, *purpose: int | str) -> None:
        """`size` is at most 2**62; the order depends on it and on `purpose` only."""
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2**62 elements, got {size}")
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = uniform_bits(_ROUNDS, "permutation", *purpose)

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the elements at these positions."""
        values = self._walk(positions.astype(np.uint64))
        # The network permutes a power of four. An element outside the range goes through the network again. At most
        # three of four elements are outside, so a few repetitions suffice.
        while (outside := values >= self.size).any():
            values[outside] = self._walk(values[outside])
        return values.astype(np.int64)

    def _walk(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter the bits of each number (the finaliser of SplitMix64); overflow wraps, as it must."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> Permutation:
    """Return the order of `size` blocks in one pass over the data. The last few are kept for further steps."""
    return Permutation(size, "epoch", seed, epoch)
