"""How tensors are packed for a link: bytes that travel, and seconds that packing and unpacking take.

What a codec does to convergence is not the simulator's to say: it answers what a ratio would buy in time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from fusionai.errors import ConfigError


class Codec(ABC):
    """A way to send a tensor. Packing occupies the sender's device, unpacking the receiver's."""

    @abstractmethod
    def sent_bytes(self, size_bytes: float) -> float:
        """Return the bytes that travel for a tensor of `size_bytes`."""

    @abstractmethod
    def encode_s(self, size_bytes: float, peer: str) -> float:
        """Return the seconds that packing takes on a machine."""

    @abstractmethod
    def decode_s(self, size_bytes: float, peer: str) -> float:
        """Return the seconds that unpacking takes on a machine."""


@dataclass(frozen=True, slots=True)
class Dense(Codec):
    """Tensors as they are; nothing to compute."""

    def sent_bytes(self, size_bytes: float) -> float:
        """Return `size_bytes`."""
        return size_bytes

    def encode_s(self, size_bytes: float, peer: str) -> float:
        """Return 0."""
        return 0.0

    def decode_s(self, size_bytes: float, peer: str) -> float:
        """Return 0."""
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(Codec):
    """One element in `ratio`, each with its index; a what-if in the shape of FusionLLM's compressor.

    The bytes are those of values and indices, and never more than dense: at a ratio below 2 (4-byte values and
    indices) the tensor goes as it is. FusionLLM (arXiv 2410.12707) chooses ratios by link; here they are given.
    Packing reads the tensor three times (selecting takes two), unpacking writes it once, at the machine's memory
    bandwidth; a machine without one packs in no time.

    Raises ConfigError for a ratio below 1 or sizes that are not positive.
    """

    ratio: float
    value_bytes: int = 4
    index_bytes: int = 4
    memory_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """By peer."""

    def __post_init__(self) -> None:
        if not (self.ratio >= 1 and math.isfinite(self.ratio)):
            raise ConfigError(f"the ratio of Top-K must be a number of at least 1, got {self.ratio}")
        if self.value_bytes < 1 or self.index_bytes < 0:
            raise ConfigError(
                f"Top-K needs value_bytes >= 1 and index_bytes >= 0, got {self.value_bytes} and {self.index_bytes}"
            )

    def sent_bytes(self, size_bytes: float) -> float:
        """Return the bytes of values and indices, at most `size_bytes`."""
        kept = math.ceil(size_bytes / self.value_bytes / self.ratio)
        return min(size_bytes, kept * (self.value_bytes + self.index_bytes))

    def encode_s(self, size_bytes: float, peer: str) -> float:
        """Return the seconds of three passes over the tensor; 0 if it goes dense."""
        return 3 * self._pass_s(size_bytes, peer)

    def decode_s(self, size_bytes: float, peer: str) -> float:
        """Return the seconds of one pass over the tensor; 0 if it goes dense."""
        return self._pass_s(size_bytes, peer)

    def _pass_s(self, size_bytes: float, peer: str) -> float:
        if self.sent_bytes(size_bytes) >= size_bytes or peer not in self.memory_bytes_per_s:
            return 0.0
        return size_bytes / self.memory_bytes_per_s[peer]
