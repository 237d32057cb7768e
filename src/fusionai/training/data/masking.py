"""Masking for masked language models, as in BERT: which tokens to guess, and what stands in their place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusionai.training.data.keyed_random import uniform_bits

IGNORED = -100
"""Label of a position that does not count in the loss (torch's default)."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """The model guesses 15 % of the tokens. Of these, 80 % become the mask token, 10 % a random one, and 10 % stay."""

    mask_token: int
    vocabulary_size: int
    special_tokens: tuple[int, ...]
    """Tokens that the model never has to guess."""
    share: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"the masked share must be in (0, 1], got {self.share}")
        if not 0 <= self.mask_token < self.vocabulary_size:
            raise ValueError(f"mask token {self.mask_token} is outside a vocabulary of {self.vocabulary_size}")

    def apply(self, tokens_BT: Ids, *purpose: int | str) -> tuple[Ids, Ids]:
        """Return inputs and labels, both (B, T) int64. The choice of tokens depends on `purpose` only.

        Every sequence has at least one token to guess. Without one its mean loss would be 0/0.
        """
        draws = uniform_bits(3 * tokens_BT.size, "mask", *purpose).reshape(3, *tokens_BT.shape)
        chance_BT, fate_BT = (draws[:2] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        # Special tokens come last in the order of choice, so they are chosen only if there is nothing else.
        chance_BT += np.isin(tokens_BT, self.special_tokens)
        first_B1 = chance_BT.argmin(axis=1, keepdims=True)
        chosen_BT = chance_BT < self.share
        np.put_along_axis(chosen_BT, first_B1, True, axis=1)
        random_BT = (draws[2] % np.uint64(self.vocabulary_size)).astype(np.int64)
        guessed_BT = np.where(fate_BT < 0.8, self.mask_token, np.where(fate_BT < 0.9, random_BT, tokens_BT))
        return np.where(chosen_BT, guessed_BT, tokens_BT), np.where(chosen_BT, tokens_BT, IGNORED)
