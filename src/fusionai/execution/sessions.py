"""The face of a program that generates tokens: sessions with a KV cache.

A session is one sequence that grows. The program keeps the keys and values of its tokens behind `fusion.attention`:
they are no part of the OP-DAG, and they never cross the wire. No plane implements this face yet
(`PlaneAbilities.decoding` is false for all of them); it fixes what a serving host will call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NewType

import msgspec

from fusionai.errors import ConfigError
from fusionai.execution.program import Program
from fusionai.graph.model import Sizes, ValueName
from fusionai.tensor import TensorData

SessionId = NewType("SessionId", int)
"""Names a session in one program. The caller chooses it, and may use it again after the session is closed."""


class SessionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on the sessions of one program together. Raises ConfigError for a bound below 1."""

    cache_bytes: int
    """Most bytes of all KV caches: what the provider offers, less the weights and the working memory of a pass."""
    sessions: int
    """Most sessions that are open at one time."""

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if getattr(self, field) < 1:
                raise ConfigError(f"sessions: {field} must be at least 1, got {getattr(self, field)}")


class SessionProgram(Program):
    """Runs sessions: opens them, decodes their next tokens stage by stage, and closes them.

    Passes run without gradients, with dropout and batch statistics in inference mode. They read the weights as they
    are at the time of the call. Setting a weight empties the cache of every open session, because its keys and
    values came from the old weights; the caller then decodes from position 0.
    """

    @abstractmethod
    def open_session(self, session: SessionId, most_tokens: int) -> None:
        """Reserve a KV cache for up to `most_tokens` tokens in every stage of the program.

        The whole amount is reserved, so a session that was opened never runs out of memory halfway.

        Raises SessionRefused when `SessionLimits` do not allow it: the text says how many bytes it takes and how many
        are free. Raises JobError when a session of this name is open.
        """

    @abstractmethod
    def decode(
        self,
        stage: int,
        sessions: Sequence[SessionId],
        starts: Sequence[int],
        sizes: Sizes,
        values: Mapping[ValueName, TensorData],
    ) -> dict[ValueName, TensorData]:
        """Run a stage on the next tokens of several sessions in one pass.

        Row b of the batch axis belongs to `sessions[b]`, and its first token stands at position `starts[b]` of the
        sequence. All rows bring the same number of tokens, which `sizes` gives: many for a prompt, one for generation.
        A plane may pad to sizes that it has compiled. Each stage keeps count of the tokens that it has cached.

        A start before the end of the cached tokens drops those from there on. So a caller takes back tokens that it
        only guessed, and decodes a lost span again, by sending the span once more.

        Returns one tensor for each value that the stage sends.

        Raises JobError for a session that is not open, a start beyond the cached tokens (tokens are missing between),
        or a span past `most_tokens`. Raises GraphError as `RoundProgram.forward` does. After an error the caches are
        as they were before the call.
        """

    @abstractmethod
    def close_session(self, session: SessionId) -> None:
        """Free the KV cache of a session. Does nothing for a session that is not open."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Return the bytes that are reserved for open sessions now; at most `SessionLimits.cache_bytes`."""
