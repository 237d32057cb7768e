"""Requests to a served model: lengths drawn with a seed, and when they arrive."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from fusionai.errors import ConfigError

PROMPT_TOKENS, OUTPUT_TOKENS = 750, 240
"""Mean lengths by which Helix plans for the conversations of the Azure LLM inference trace 2023 (Patel et al.,
Splitwise, ISCA 2024): constants of its artifact, `simulator/event_simulator/utils.py`."""

LONGEST_PROMPT, LONGEST_OUTPUT = 2048, 1024
"""The first is from the same file, the second assumed."""

_DRAWS = 1000
"""Tries to draw a length below its limit before the limit is taken."""


@dataclass(frozen=True, slots=True)
class Request:
    """One conversation: a prompt that gets an answer of known length."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Exponential lengths around means, cut off: assumed, only the means and the limits are published.

    The means are reached in spite of the cut-off. Raises ConfigError for a mean below 1 or not well below its limit.
    """

    prompt_tokens: float = PROMPT_TOKENS
    output_tokens: float = OUTPUT_TOKENS
    longest_prompt: int = LONGEST_PROMPT
    longest_output: int = LONGEST_OUTPUT

    def __post_init__(self) -> None:
        for mean, longest, field in (
            (self.prompt_tokens, self.longest_prompt, "prompt_tokens"),
            (self.output_tokens, self.longest_output, "output_tokens"),
        ):
            if not 1 <= mean < 0.45 * longest:
                raise ConfigError(
                    f"lengths.{field} must be at least 1 and below 0.45 of the longest, {longest}, got {mean}; raise "
                    "the longest"
                )

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """Return so many (prompt, output) lengths, the same for the same seed."""
        draw = random.Random(seed)
        scales = [
            _scale(self.prompt_tokens, self.longest_prompt),
            _scale(self.output_tokens, self.longest_output),
        ]
        limits = (self.longest_prompt, self.longest_output)
        return [(_length(draw, scales[0], limits[0]), _length(draw, scales[1], limits[1])) for _ in range(count)]


def offline(lengths: list[tuple[int, int]]) -> list[Request]:
    """Return requests that are all there from the start."""
    return [Request(0.0, prompt, output) for prompt, output in lengths]


def poisson(lengths: list[tuple[int, int]], requests_per_s: float, seed: int) -> list[Request]:
    """Return requests that arrive at random times. Raises ConfigError for a rate that is not above 0."""
    if not 0 < requests_per_s < math.inf:
        raise ConfigError(f"requests_per_s must be above 0 and finite, got {requests_per_s}")
    draw, now_s, found = random.Random(seed), 0.0, []
    for prompt, output in lengths:
        now_s += draw.expovariate(requests_per_s)
        found.append(Request(now_s, prompt, output))
    return found


def _length(draw: random.Random, scale: float, longest: int) -> int:
    for _ in range(_DRAWS):
        if (length := math.ceil(draw.expovariate(1 / scale))) <= longest:
            return max(length, 1)
    return longest


def _scale(mean: float, longest: int) -> float:
    """Return the scale of an exponential whose mean, cut off at `longest` and rounded up, is `mean`."""
    low, high = 1e-3, 50.0 * mean
    for _ in range(60):
        middle = (low + high) / 2
        # Mean of an exponential below a limit, plus half a token for rounding up.
        left = longest / middle
        cut = middle - longest / math.expm1(left) if left < 700 else middle
        low, high = (middle, high) if cut + 0.5 < mean else (low, middle)
    return (low + high) / 2
