"""What the requests to a served model are like, as far as placement depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from fusionai.errors import ConfigError


class ServingLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Means over many requests. Lengths are in tokens.

    A request keeps room in the caches for its whole length from its admission to its end, so a long answer counts as
    often as it has tokens in `context_tokens` and `reserved_tokens`.

    Raises ConfigError for a length below 1, or that is not finite.
    """

    prompt_tokens: float
    prompt_pairs: float
    """Mean square of the prompts' lengths: pairs of tokens that attention works on."""
    output_tokens: float
    """The first of them comes out of the prompt's pass, each other one out of a decode pass."""
    context_tokens: float
    """Attended to by a decode pass, mean over all decode passes."""
    reserved_tokens: float
    """Room that a request takes in a cache, mean over all generated tokens."""

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if not 1 <= (value := getattr(self, field)) < math.inf:
                raise ConfigError(f"load.{field} must be at least 1 token and finite, got {value}")

    @property
    def decode_share(self) -> float:
        """Return the share of generated tokens that come out of decode passes."""
        return (self.output_tokens - 1) / self.output_tokens

    @property
    def carried_tokens(self) -> float:
        """Return the tokens that cross a link between two machines for each token generated."""
        return (self.prompt_tokens + self.output_tokens - 1) / self.output_tokens


def load_of(lengths: Sequence[tuple[int, int]]) -> ServingLoad:
    """Return the load of requests with these (prompt, output) lengths, exactly.

    Raises ConfigError when there are none, or one has a length below 1.
    """
    if not lengths or min(map(min, lengths)) < 1:
        raise ConfigError("load.lengths must be pairs of prompt and output tokens, each at least 1; give one at least")
    count = len(lengths)
    generated = sum(output for _, output in lengths)
    decoded = generated - count
    # Decode pass k of a request (k = 1 .. output - 1) attends to prompt + k tokens.
    attended = sum((output - 1) * prompt + output * (output - 1) / 2 for prompt, output in lengths)
    prompts = sum(prompt for prompt, _ in lengths)
    return ServingLoad(
        prompt_tokens=prompts / count,
        prompt_pairs=sum(prompt**2 for prompt, _ in lengths) / count,
        output_tokens=generated / count,
        context_tokens=attended / decoded if decoded else prompts / count,
        reserved_tokens=sum(output * (prompt + output) for prompt, output in lengths) / generated,
    )
