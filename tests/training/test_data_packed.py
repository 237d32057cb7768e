"""Packed text: what is stored, what is held out, and batches that are pure functions of seed, step and index."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from transformers import PreTrainedTokenizerFast

from fusionai.errors import DataError, StorageError
from fusionai.tensor import TensorData
from fusionai.training.data.keyed_random import Permutation
from fusionai.training.data.packed import PackedText, pack_documents
from fusionai.training.data.sources import text_documents
from fusionai.training.data.tokenizer import end_token, masking, train_tokenizer


@pytest.fixture(scope="module")
def documents() -> list[str]:
    iterator = text_documents("stdlib")
    return [next(iterator) for _ in range(40)]


@pytest.fixture(scope="module")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(documents[:10], 400)


@pytest.fixture(scope="module")
def packed(documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "tokens.npy"
    pack_documents(documents, tokenizer, path)
    return path


def array(tensor: TensorData) -> npt.NDArray[np.int64]:
    assert tensor.dtype == "int64"
    return np.frombuffer(tensor.data, dtype="<i8").reshape(tensor.shape)


def numbered(path: Path, blocks: int, length: int) -> Path:
    """A packed text whose every block holds its own number."""
    np.save(path, np.repeat(np.arange(blocks, dtype=np.uint16), length))
    return path


def rows(text: PackedText, seed: int, step: int, *, microbatches: int, batch_size: int) -> list[int]:
    batch = [
        text.microbatch(seed, step, index, microbatches=microbatches, batch_size=batch_size)
        for index in range(microbatches)
    ]
    return [int(row[0]) for microbatch in batch for row in array(microbatch["input_ids"])]


def test_packed_tokens_decode_to_the_documents(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, packed: Path
) -> None:
    tokens = np.load(packed)
    assert tokens.dtype == np.uint16
    ends = np.flatnonzero(tokens == end_token(tokenizer))
    assert len(ends) == len(documents)
    assert ends[-1] == len(tokens) - 1
    parts = np.split(tokens, ends[:-1] + 1)
    assert [tokenizer.decode(part[:-1]) for part in parts] == documents


def test_a_large_vocabulary_takes_uint32(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    large = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    large.add_tokens([f"word{number}" for number in range(70_000)])
    assert pack_documents(["word69999 x"], large, tmp_path / "x.npy") > 1
    tokens = np.load(tmp_path / "x.npy")
    assert tokens.dtype == np.uint32
    assert tokens.max() > 65_535
    assert large.decode(tokens[:-1]) == "word69999 x"


def test_a_failure_leaves_the_packed_text_that_was_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "x.npy"
    pack_documents(["before"], tokenizer, path)
    before = path.read_bytes()

    def failing() -> Iterator[str]:
        yield from ["text " * 30_000] * 8
        raise DataError("line 7 is wrong")

    with pytest.raises(DataError, match="line 7"):
        pack_documents(failing(), tokenizer, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusing_disk_is_a_storage_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"tokens\.npy cannot be written"):
        pack_documents(["text"], tokenizer, tmp_path / "file" / "tokens.npy")


@pytest.mark.parametrize(("blocks", "fraction"), [(2, 0.02), (3, 0.4), (7, 0.3), (49, 0.02), (50, 0.02), (997, 0.1)])
def test_every_block_once_an_epoch_and_none_held_out(tmp_path: Path, blocks: int, fraction: float) -> None:
    text = PackedText(numbered(tmp_path / "x.npy", blocks, 4), 4, heldout_fraction=fraction)
    heldout = {int(row[0]) for batch in text.heldout_batches(1, blocks) for row in array(batch["input_ids"])}
    assert len(heldout) == text.heldout_blocks >= 1
    assert len(text) + len(heldout) == blocks
    if blocks > 20:
        assert len(heldout) == pytest.approx(blocks * fraction, abs=1)
    orders = []
    for epoch in range(3):
        seen = [rows(text, 5, epoch * len(text) + step, microbatches=1, batch_size=1)[0] for step in range(len(text))]
        assert sorted(seen) == sorted(set(range(blocks)) - heldout)
        orders.append(seen)
    if blocks > 20:
        assert orders[0] != orders[1] != orders[2]
        other = [rows(text, 6, step, microbatches=1, batch_size=1)[0] for step in range(len(text))]
        assert other != orders[0]


def test_how_a_step_is_cut_into_microbatches_changes_nothing(tmp_path: Path) -> None:
    text = PackedText(numbered(tmp_path / "x.npy", 103, 4), 4, heldout_fraction=0.0)
    for step in (0, 3, 12, 400):  # step 12 goes over the end of the first epoch
        whole = rows(text, 1, step, microbatches=1, batch_size=8)
        assert rows(text, 1, step, microbatches=4, batch_size=2) == whole
        assert rows(text, 1, step, microbatches=8, batch_size=1) == whole


def test_batches_do_not_depend_on_what_was_asked_before(packed: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def view(path: Path) -> dict[tuple[int, int], list[bytes]]:
        text = PackedText(path, 32, masking=masking(tokenizer))
        data = text.batches(seed=3, microbatches=2, batch_size=4)
        asked = [(step, index) for step in (7, 0, 1_000_000) for index in (1, 0)]
        return {place: [bytes(each.data) for each in data.microbatch(*place).values()] for place in asked}

    first = view(packed)
    text = PackedText(packed, 32, masking=masking(tokenizer)).batches(seed=3, microbatches=2, batch_size=4)
    for place in reversed(list(first)):
        assert [bytes(each.data) for each in text.microbatch(*place).values()] == first[place]
    assert len({str(value) for value in first.values()}) == len(first)


def test_causal_labels_are_the_inputs(packed: Path) -> None:
    text = PackedText(packed, 32)
    batch = text.microbatch(0, 0, 1, microbatches=2, batch_size=4)
    assert set(batch) == {"input_ids", "labels"}
    ids = array(batch["input_ids"])
    assert ids.shape == (4, 32)
    assert (array(batch["labels"]) == ids).all()
    flat = np.load(packed)
    blocks = flat[: len(flat) // 32 * 32].reshape(-1, 32)
    assert all((blocks == row).all(axis=1).any() for row in ids)


def test_masking_has_berts_shares(packed: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain, masked = PackedText(packed, 64), PackedText(packed, 64, masking=masking(tokenizer))
    end, mask = end_token(tokenizer), tokenizer.mask_token_id
    original_parts, inputs_parts, labels_parts = [], [], []
    for step in range(40):
        original_parts.append(array(plain.microbatch(1, step, 0, microbatches=1, batch_size=16)["labels"]))
        batch = masked.microbatch(1, step, 0, microbatches=1, batch_size=16)
        inputs_parts.append(array(batch["input_ids"]))
        labels_parts.append(array(batch["labels"]))
    original, inputs, labels = map(np.concatenate, (original_parts, inputs_parts, labels_parts))
    chosen = labels != -100
    assert (labels[chosen] == original[chosen]).all()
    assert (inputs[~chosen] == original[~chosen]).all()
    assert not (labels == end).any()
    assert chosen.any(axis=1).all()
    count = chosen.sum()  # about 6,000: five standard deviations are 0.023 of the whole and 0.026 of the chosen
    assert count / original.size == pytest.approx(0.15, abs=0.01)
    assert (inputs[chosen] == mask).sum() / count == pytest.approx(0.8, abs=0.026)
    kept = (inputs[chosen] == original[chosen]).sum() / count
    assert kept == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.02)
    assert len(set(inputs[chosen & (inputs != mask) & (inputs != original)].tolist())) > 100


def test_a_sequence_always_has_something_to_guess(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    np.save(tmp_path / "x.npy", np.tile(np.array([0, 0, 9], dtype=np.uint16), 100))
    text = PackedText(tmp_path / "x.npy", 3, heldout_fraction=0.0, masking=masking(tokenizer))
    for step in range(20):
        labels = array(text.microbatch(0, step, 0, microbatches=1, batch_size=4)["labels"])
        assert (labels == [-100, -100, 9]).all()


def test_heldout_batches_are_fixed_full_and_spread(tmp_path: Path) -> None:
    text = PackedText(numbered(tmp_path / "x.npy", 1000, 4), 4, heldout_fraction=0.1)
    batches = text.heldout_batches(8, 4)
    assert [batch["input_ids"].shape for batch in batches] == [(8, 4)] * 4
    found = [int(row[0]) for batch in batches for row in array(batch["input_ids"])]
    assert len(set(found)) == 32
    assert min(found) < 100
    assert max(found) > 900
    assert text.heldout_batches(8, 4) == batches
    assert len(text.heldout_batches(8, 10**6)) == 12
    few = PackedText(numbered(tmp_path / "y.npy", 20, 4), 4, heldout_fraction=0.1).heldout_batches(8, 4)
    assert [batch["input_ids"].shape for batch in few] == [(8, 4)]
    assert PackedText(tmp_path / "x.npy", 4, heldout_fraction=0.0).heldout_batches(8, 4) == []


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("sequences", [1, 3, 16, 120])
def test_too_little_text_says_exactly_how_much_is_needed(tmp_path: Path, fraction: float, sequences: int) -> None:
    def start(tokens: int) -> None:
        np.save(tmp_path / "x.npy", np.zeros(tokens, dtype=np.uint16))
        text = PackedText(tmp_path / "x.npy", 8, heldout_fraction=fraction)
        text.batches(seed=0, microbatches=sequences, batch_size=1)

    enough_to_open = 16
    with pytest.raises(DataError, match=r"the text has [\d,]+ tokens, but ") as caught:
        start(7 if sequences == 1 else enough_to_open)
    needed = int(str(caught.value).split(" tokens, but ")[1].split()[0].replace(",", ""))
    start(needed)
    with pytest.raises(DataError, match=f"has {needed - 1:,} tokens"):
        start(needed - 1)


def test_a_file_that_is_no_packed_text(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match="pack it again"):
        PackedText(tmp_path / "x.npy", 8)
    np.save(tmp_path / "y.npy", np.zeros((3, 3)))
    with pytest.raises(DataError, match="no packed text"):
        PackedText(tmp_path / "y.npy", 8)
    with pytest.raises(DataError, match="cannot be read"):
        PackedText(tmp_path / "missing.npy", 8)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 4097])
def test_permutation_is_one(size: int) -> None:
    order = Permutation(size, "test")[np.arange(size)]
    assert sorted(order.tolist()) == list(range(size))


def test_permutation_scatters() -> None:
    size = 1 << 20
    order = Permutation(size, "test")[np.arange(size)]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.01
    assert (np.bincount(order[: size // 64] // (size // 64), minlength=64) > 150).all()  # 256 expected


def test_orders_are_the_same_on_every_machine_and_version() -> None:
    """A resumed run must see the same data, whatever was upgraded in between."""
    golden = [662, 594, 267, 313, 256, 968, 986, 602]
    assert Permutation(1000, "epoch", 0, 0)[np.arange(8)].tolist() == golden


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_packing_takes_no_more_memory_for_a_longer_text(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        from fusionai.training.data import packed, tokenizer as tokenizers
        path = Path(sys.argv[1])
        # Smaller portions, so that a short text shows whether they bound the memory.
        tokenizers.CHARACTERS_AT_ONCE, packed._BUFFER_TOKENS = 1 << 16, 1 << 14
        tokenizer = tokenizers.train_tokenizer(["a b c d e f g"], 258)
        scale = 1 if sys.platform == "darwin" else 1024
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        packed.pack_documents(["a b c d " * 4_000] * 16, tokenizer, path)
        before = peak()
        count = packed.pack_documents(("a b c d " * 4_000 for _ in range(70)), tokenizer, path)
        text = packed.PackedText(path, 128)
        for step in range(50):
            for index in range(2): text.microbatch(0, step, index, microbatches=2, batch_size=4)
        print(count, peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "x.npy")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250).stdout.split()
    assert int(found[0]) > 2_000_000
    assert int(found[1]) < 40 << 20  # the tokens alone would take 80 MB as Python lists, their encodings 500 MB
