"""Tokenizers: loaded from the Hugging Face format, or trained on the job's own text."""

from __future__ import annotations

import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fusionai.errors import DataError
from fusionai.training.data.masking import Masking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

END = "<|endoftext|>"
MASK = "<|mask|>"
END_ID = 0
"""Id of `END` in every tokenizer that is trained here."""

LEAST_VOCABULARY = 258
"""Tokens for every byte, the end of a document, and the mask. With these any text can be tokenized."""

TRAINING_CHARACTERS = 4_000_000
"""Characters of text that a tokenizer is trained on. More of them cost seconds and hardly change the merges; with much
less the merges fit the rest of the text badly."""

_HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, or by its name on the Hugging Face hub.

    A copy that is already in the hub's cache is taken first. Code of a repository is never run. Raises DataError.
    """
    folder = Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        return _load(str(folder), f"the folder {folder}", "it must hold tokenizer.json", local=True)
    if not _HUB_NAME.fullmatch(name_or_path) or folder.exists():
        raise DataError(f"tokenizer {name_or_path!r}: neither an existing folder nor a name on the hub")
    try:
        return _load(name_or_path, "the hub's cache on this machine", "it is not there", local=True)
    except DataError:
        log.debug("tokenizer %s is not in the cache of the hub", name_or_path)
    remedy = (
        "check the name and the internet connection, or give a folder with the tokenizer's files; "
        "without data.tokenizer one is trained on the text"
    )
    if not _hub_resolves():
        # The hub's client would retry for most of a minute before it says so.
        raise DataError(f"tokenizer {name_or_path!r}: the hub cannot be reached from this machine; {remedy}")
    return _load(name_or_path, "the hub", remedy, local=False)


def _load(name: str, place: str, remedy: str, *, local: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        # The loader passes on all errors of its parsers (OSError, ValueError, KeyError, exceptions of Rust code).
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"tokenizer {name!r} cannot be loaded from {place}: {lines[0]}; {remedy}") from error


def _hub_resolves() -> bool:
    """Return whether the hub may be reachable: its address resolves, or a proxy resolves it."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    if host is None or "https" in urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def train_tokenizer(documents: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with an end-of-document (id 0) and a mask token (id 1).

    Uses the first TRAINING_CHARACTERS of the text. The same text gives the same tokenizer. The vocabulary is smaller
    than `size` where the text has no more pairs to merge. Raises DataError when there is no text, or when the
    vocabulary is too small for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary_size < LEAST_VOCABULARY:
        raise DataError(f"data.vocabulary_size must be at least {LEAST_VOCABULARY}, got {vocabulary_size}")
    sample = list(_first_characters(documents, TRAINING_CHARACTERS))
    if not sample:
        raise DataError("there is no text to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )


def _first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    for document in documents:
        yield document[:limit]
        limit -= len(document)
        if limit <= 0:
            return


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a document: the end-of-text token, or BERT's separator.

    Raises DataError when the tokenizer has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    raise DataError("the tokenizer has neither an end-of-text nor a separator token; choose another tokenizer")


def masking(tokenizer: PreTrainedTokenizerBase) -> Masking:
    """Return the masking of this tokenizer's sequences for a masked language model.

    Raises DataError when the tokenizer has no mask token.
    """
    mask = tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise DataError(
            'the tokenizer has no mask token, which task = "masked" needs; choose the tokenizer of a masked '
            "language model, or leave data.tokenizer out to have one trained on the text"
        )
    return Masking(
        mask_token=mask, vocabulary_size=len(tokenizer), special_tokens=tuple(sorted(tokenizer.all_special_ids))
    )


CHARACTERS_AT_ONCE = 1 << 19
"""Characters given to the tokenizer in one call: enough for its threads, and few enough for the memory (an unfinished
encoding takes some hundred bytes a token)."""


def token_ids(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield each document's token ids and the end token. Text that looks like a special token stays text."""
    end = end_token(tokenizer)
    for group in _groups(documents, CHARACTERS_AT_ONCE):
        encoded = tokenizer(
            group,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            yield [*ids, end]


def _groups(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group
