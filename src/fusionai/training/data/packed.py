"""Packed text: documents as one long row of tokens on disk, cut into blocks of one length.

The blocks of a batch are computed from seed, step and index, so no iterator has a state that must be saved. Every block
is used once in each pass over the data. Every `period`-th block is held out and never trained on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from fusionai.errors import DataError, StorageError
from fusionai.tensor import TensorData
from fusionai.training.data.batches import Batch
from fusionai.training.data.keyed_random import epoch_order
from fusionai.training.data.masking import Ids, Masking
from fusionai.training.data.tokenizer import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUFFER_TOKENS = 1 << 18
"""Tokens that are collected before they are written. More of them take more memory; fewer make more writes."""


def pack_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, path: Path) -> int:
    """Tokenize documents into a .npy file of uint16 (uint32 for a larger vocabulary); return how many tokens.

    Each document is followed by the end token. The file appears at `path` only when it is complete. At most one long
    document and a buffer of tokens are in memory. Raises StorageError when the disk refuses a write.
    """
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                start = _write_header(file, dtype, 0)
                for tokens in _arrays(token_ids(documents, tokenizer), dtype):
                    file.write(tokens.data)
                    count += len(tokens)
                file.seek(0)
                # numpy pads the header, so it has the same size for any length and can be overwritten.
                if _write_header(file, dtype, count) != start:
                    raise AssertionError("the header of a .npy file has changed its length")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        what = f"no space is left after {count:,} tokens; free some" if full else error.strerror or str(error)
        raise StorageError(f"the packed text {path} cannot be written: {what}") from error
    return count


def _write_header(file: BinaryIO, dtype: np.dtype[np.generic], count: int) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _arrays(rows: Iterable[list[int]], dtype: np.dtype[np.generic]) -> Iterable[npt.NDArray[np.unsignedinteger]]:
    held: list[int] = []
    for row in rows:
        held += row
        if len(held) >= _BUFFER_TOKENS:
            yield np.array(held, dtype=dtype)
            held.clear()
    yield np.array(held, dtype=dtype)


class PackedText:
    """Blocks of a packed text, as batches. The tokens stay on disk, and only the needed ones are read."""

    def __init__(
        self,
        path: Path,
        sequence_length: int,
        *,
        heldout_fraction: float = 0.02,
        masking: Masking | None = None,
    ) -> None:
        """Open a file that `pack_documents` wrote. With `masking`, batches are for a masked language model.

        About `heldout_fraction` of the blocks is held out: one in round(1 / fraction), and at least one. Raises
        DataError when the text is too short for one training block and, if some are held out, one held-out block.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
        if not 0 <= heldout_fraction < 0.5:
            raise ValueError(f"heldout_fraction must be in [0, 0.5), got {heldout_fraction}")
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"the packed text {path} cannot be read: {error}; pack it again") from error
        if tokens.ndim != 1 or tokens.dtype.kind != "u":
            raise DataError(f"{path} is no packed text but {tokens.dtype}{list(tokens.shape)}; pack it again")
        self.tokens = len(tokens)
        """Tokens of the whole text."""
        self.sequence_length = sequence_length
        blocks = self.tokens // sequence_length
        self._blocks_NT = tokens[: blocks * sequence_length].reshape(blocks, sequence_length)
        self._masking = masking
        self._heldout_fraction = heldout_fraction
        self._period = min(_period(heldout_fraction), max(2, blocks)) if heldout_fraction else 0
        self.heldout_blocks = blocks // self._period if self._period else 0
        self.training_blocks = blocks - self.heldout_blocks
        self._require(1)

    def _require(self, training_blocks: int) -> None:
        if self.training_blocks >= training_blocks and (self.heldout_blocks or not self._period):
            return
        extra = 0
        if self._heldout_fraction:
            extra = max(1, (training_blocks - 1) // (_period(self._heldout_fraction) - 1))
        needed = (training_blocks + extra) * self.sequence_length
        raise DataError(
            f"the text has {self.tokens:,} tokens, but {needed:,} are needed: {training_blocks} sequences of "
            f"{self.sequence_length} to train on and {extra} held out. Add text, or lower data.sequence_length, "
            "training.batch_size or training.microbatches"
        )

    def __len__(self) -> int:
        """Sequences to train on in one pass over the data."""
        return self.training_blocks

    def microbatch(self, seed: int, step: int, index: int, *, microbatches: int, batch_size: int) -> Batch:
        """Return microbatch `index` of a step: `input_ids` and `labels`, both int64 (batch_size, sequence_length).

        The content depends on the arguments and the text only. For a causal model the labels are the inputs (the
        model shifts them). For a masked model a label is -100, except where the model must guess the token.
        """
        if not 0 <= index < microbatches:
            raise ValueError(f"microbatch {index} is outside a step of {microbatches}")
        first = (step * microbatches + index) * batch_size
        places = np.arange(first, first + batch_size, dtype=np.int64)
        epochs, places = np.divmod(places, self.training_blocks)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            chosen[inside] = epoch_order(self.training_blocks, seed, int(epoch))[places[inside]]
        if self._period:
            # After every period - 1 training blocks comes a held-out block, which is skipped.
            chosen += chosen // (self._period - 1)
        return self._batch(chosen, seed, step, index)

    def heldout_batches(self, batch_size: int, limit: int) -> list[Batch]:
        """Return at most `limit` batches spread evenly over the held-out blocks, the same ones every time.

        Every batch has `batch_size` sequences. If there are fewer held-out blocks than that, blocks repeat.
        """
        if not self.heldout_blocks or limit < 1:
            return []
        count = min(limit, max(1, self.heldout_blocks // batch_size))
        rows = np.arange(count * batch_size, dtype=np.int64)
        chosen = rows * self.heldout_blocks // len(rows) if len(rows) <= self.heldout_blocks else rows
        blocks = chosen % self.heldout_blocks * self._period + self._period - 1
        return [self._batch(part, "heldout", index) for index, part in enumerate(blocks.reshape(count, batch_size))]

    def batches(self, *, seed: int, microbatches: int, batch_size: int, heldout_limit: int = 4) -> TextBatches:
        """Return this text as the data of a job. Raises DataError when it has not enough for one step."""
        self._require(microbatches * batch_size)
        return TextBatches(self, seed, microbatches, batch_size, heldout_limit)

    def _batch(self, blocks: npt.NDArray[np.int64], *purpose: int | str) -> Batch:
        tokens_BT: Ids = self._blocks_NT[blocks].astype(np.int64)
        inputs_BT, labels_BT = tokens_BT, tokens_BT
        if self._masking is not None:
            inputs_BT, labels_BT = self._masking.apply(tokens_BT, *purpose)
        return {"input_ids": _tensor(inputs_BT), "labels": _tensor(labels_BT)}


def _period(heldout_fraction: float) -> int:
    return max(2, round(1 / heldout_fraction))


def _tensor(ids_BT: Ids) -> TensorData:
    return TensorData("int64", ids_BT.shape, ids_BT.astype("<i8", copy=False).tobytes())


@dataclass(frozen=True, slots=True)
class TextBatches:
    """A packed text as a job's data (`fusionai.training.data.batches.Batches`)."""

    text: PackedText
    seed: int
    microbatches: int
    batch_size: int
    heldout_limit: int

    def microbatch(self, step: int, index: int) -> Batch:
        """Return a microbatch of a step."""
        return self.text.microbatch(self.seed, step, index, microbatches=self.microbatches, batch_size=self.batch_size)

    def heldout(self) -> Sequence[Batch]:
        """Return the held-out microbatches."""
        return self.text.heldout_batches(self.batch_size, self.heldout_limit)
