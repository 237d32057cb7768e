"""What a private job shows to others: everything that compnodes and the broker receive, decrypted, is searched.

The same search of the same model in an open job finds all of it, so what it does not find is not there. Not searched
for is what boundary tensors give away about the data (docs/guarantees.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import torch
import transformers
from models import CONFIGURATIONS, Batch
from recording import Recorded, RecordedPool
from torch import nn

import fusionai
from fusionai.pool.codec import ASSIGNMENT
from fusionai.training.assignment_parcels import unpack
from fusionai.training.messages import Boundary, WeightTensor
from leaks import FRAGMENT, IGNORED, encodings, leaks

VOCABULARY = 251
"""A prime that no other size shares, so that it shows wherever a tensor has an axis of the vocabulary."""
BATCH, LENGTH, STEPS, MICROBATCHES = 2, 32, 2, 2
MODELS = ["llama", "bert"]
"""BERT's head shares its weight with the embedding, this Llama's has its own."""


def make_model(name: str) -> nn.Module:
    torch.manual_seed(11)
    settings = {**CONFIGURATIONS[name], "vocab_size": VOCABULARY}
    config = transformers.AutoConfig.for_model(name.split("-")[0], **settings)
    kind: Any = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model: nn.Module = kind.from_config(config)
    return model.train()


def batches(name: str) -> Callable[[int, int], Batch]:
    """Return batches whose labels are no copy of the inputs, so that each is found for itself."""

    def batch(step: int, index: int) -> Batch:
        generator = torch.Generator().manual_seed(77 * step + index)
        ids, labels = torch.randint(3, VOCABULARY, (2, BATCH, LENGTH), generator=generator)
        if name == "bert":
            labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) > 0.4, IGNORED)
        return {"input_ids": ids.clone(), "labels": labels.clone()}

    return batch


def owned_keys(model: nn.Module) -> set[str]:
    """Return every name of the weights that turn tokens into vectors and vectors into logits."""
    layers: Any = model
    owned = {
        id(tensor)
        for layer in (layers.get_input_embeddings(), layers.get_output_embeddings())
        for tensor in layer.parameters()
    }
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in owned}


@dataclass(frozen=True)
class Capture:
    """What others received in one job."""

    received: dict[str, list[Recorded]]
    """Frames by process."""
    batches: list[Batch]
    keys: set[str]
    """Of embedding and head."""
    rows: dict[str, list[bytes]]
    """Rows of these weights before training, by key."""

    @property
    def compnodes(self) -> list[Recorded]:
        """Frames of all compnodes."""
        return [frame for name, frames in self.received.items() if name != "broker" for frame in frames]


Run = Callable[[str, Literal["private", "open"]], Capture]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Train a model once in each mode on two compnodes, and give what everybody but the owner received."""
    folder = tmp_path_factory.mktemp("recorded")
    with RecordedPool(2, folder=folder) as pool:
        recordings = pool.recordings()

        @cache
        def train(name: str, privacy: Literal["private", "open"]) -> Capture:
            model, batch = make_model(name), batches(name)
            keys = owned_keys(model)
            weights = model.state_dict()
            rows = {key: [row.numpy().tobytes() for row in torch.atleast_2d(weights[key])] for key in keys}
            for recording in recordings.values():
                recording.take()
            fusionai.train(
                model,
                batch,
                broker=pool.token,
                steps=STEPS,
                microbatches=MICROBATCHES,
                privacy=privacy,
                compnodes=2,
                run=folder / f"{name}-{privacy}",
            )
            return Capture(
                {process: recording.take() for process, recording in recordings.items()},
                [batch(step, index) for step in range(STEPS) for index in range(MICROBATCHES)],
                keys,
                rows,
            )

        yield train


def joined(frames: list[Recorded]) -> bytes:
    return b"\n".join(part for frame in frames for part in (frame.header, frame.body))


def found_in(frames: list[Recorded], capture: Capture) -> dict[str, set[str]]:
    haystack = joined(frames)
    found: dict[str, set[str]] = {}
    for batch in capture.batches:
        for name, forms in leaks(haystack, batch).items():
            found.setdefault(name, set()).update(forms)
    return found


def decoded(frames: list[Recorded], kind: str, header: type[Any]) -> list[Any]:
    return [msgspec.msgpack.decode(frame.inner_header, type=header) for frame in frames if frame.kind == kind]


# --- what is recorded is all there is ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_capture_holds_every_kind_of_message(run: Run, name: str) -> None:
    capture = run(name, "private")
    for process, frames in capture.received.items():
        kinds = [frame.kind for frame in frames]
        if process == "broker":
            assert {"broker.graph", "broker.submit_job"} <= set(kinds)
            continue
        assert {
            ASSIGNMENT,
            "broker.assign_share",
            "train.weight_tensor",
            "train.finish_loading",
            "train.pull_weights",
            "train.end_share",
        } <= set(kinds)
        assert kinds.count("train.begin_round") == kinds.count("train.commit_round") == STEPS
        # Of every microbatch a hidden state from one side and its gradient from the other; more where layers are cut.
        assert kinds.count("train.boundary") >= 2 * STEPS * MICROBATCHES


# --- tokens and labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_private_job_shows_no_token_and_no_label(run: Run, name: str) -> None:
    capture = run(name, "private")
    for process, frames in capture.received.items():
        assert found_in(frames, capture) == {}, f"{process} received data"


@pytest.mark.parametrize("name", MODELS)
def test_the_same_search_finds_all_in_an_open_job(run: Run, name: str) -> None:
    capture = run(name, "open")
    found = found_in(capture.compnodes, capture)
    assert set(found) == {"input_ids", "labels"}
    assert all("int64 little-endian" in forms for forms in found.values())
    assert found_in(capture.received["broker"], capture) == {}, "the broker sees no tensors in any job"
    for batch in capture.batches:
        assert set(leaks(joined(capture.compnodes), batch)) == {"input_ids", "labels"}, "of each microbatch"


@pytest.mark.parametrize("form", list(encodings(range(3, 3 + FRAGMENT))))
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_search_finds_every_form(form: str, name: str) -> None:
    """What begins in the middle, as labels do that were shifted, is found too, whatever lies around it."""
    batch = batches(name)(0, 0)
    noise = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before, after = bytes(noise[:30_001].tolist()), bytes(noise[30_001:].tolist())
    assert leaks(before + after, batch) == {}
    for hidden, values in batch.items():
        sequence = values[1].tolist()[1:-1]
        planted = encodings(sequence)[form]
        assert form in leaks(before + planted + after, batch).get(hidden, set()), hidden


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_search_finds_the_sorted_set(name: str) -> None:
    batch = batches(name)(0, 0)
    for hidden, values in batch.items():
        distinct = values[values != IGNORED].unique().tolist()
        assert hidden in leaks(encodings(distinct)["int32 little-endian"], batch)


# --- embedding, head and logits ------------------------------------------------------------------------------


def shown_weights(capture: Capture) -> set[str]:
    return {header.key for header in decoded(capture.compnodes, "train.weight_tensor", WeightTensor)}


def shown_rows(capture: Capture) -> set[str]:
    """Return the keys of which some row was received, outside boundary tensors.

    A boundary tensor behind an embedding that nothing is added to consists of the rows of its tokens.
    """
    haystack = joined([frame for frame in capture.compnodes if frame.kind != "train.boundary"])
    return {
        key
        for key, rows in capture.rows.items()
        # A weight that starts at zero, as a head's bias does, is everywhere.
        if any(row in haystack for row in rows if any(row))
    }


def vocabulary_sized(capture: Capture) -> set[str]:
    """Return what was received with an axis of the vocabulary: tensors by kind of message, values by name."""
    found = set()
    for frame in capture.compnodes:
        # The shape in a header need not be true, but a product that holds a prime is divisible by it.
        if frame.kind.startswith("train.") and frame.body and len(frame.body) % VOCABULARY == 0:
            found.add(frame.kind)
        if frame.kind == ASSIGNMENT:
            for subdag in unpack(frame.body).share.subdags:
                types = dict(subdag.types)
                types |= {weight.name: weight.type for weight in subdag.weights}
                types |= {transfer.value: transfer.type for transfer in (*subdag.receives, *subdag.sends)}
                found |= {name for name, each in types.items() if VOCABULARY in each.shape}
    for header in decoded(capture.compnodes, "train.boundary", Boundary):
        if VOCABULARY in header.shape:
            found.add(header.value)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_embedding_head_and_logits_stay(run: Run, name: str) -> None:
    capture = run(name, "private")
    assert shown_weights(capture), "compnodes received weights"
    assert not shown_weights(capture) & capture.keys
    assert shown_rows(capture) == set()
    assert vocabulary_sized(capture) == set()
    everything = joined(capture.compnodes)
    assert not any(key.encode() in everything for key in capture.keys), "not even the names of these weights"


@pytest.mark.parametrize("name", MODELS)
def test_the_same_checks_find_embedding_and_head_in_an_open_job(run: Run, name: str) -> None:
    capture = run(name, "open")
    assert shown_weights(capture) & capture.keys
    assert shown_rows(capture) == {key for key, rows in capture.rows.items() if any(any(row) for row in rows)}
    assert {"train.weight_tensor"} < vocabulary_sized(capture), "weights, and values of the sub-DAGs"


# --- inputs as the compnodes' graphs see them ----------------------------------------------------------------


def raw_inputs(capture: Capture) -> set[str]:
    return {
        item.name
        for frame in capture.compnodes
        if frame.kind == ASSIGNMENT
        for subdag in unpack(frame.body).share.subdags
        for item in subdag.inputs
        if item.role != "positions"
    } | {header.value for header in decoded(capture.compnodes, "train.boundary", Boundary) if header.source == -1}


@pytest.mark.parametrize("name", MODELS)
def test_no_compnode_reads_an_input(run: Run, name: str) -> None:
    assert raw_inputs(run(name, "private")) == set()
    assert raw_inputs(run(name, "open")) == {"input_ids", "labels"}
    for header in decoded(run(name, "private").compnodes, "train.boundary", Boundary):
        assert header.dtype == "float32", "activations and gradients only"


def test_captures_are_kept_apart(run: Run, tmp_path: Path) -> None:
    """A job's capture holds that job's messages alone, or the comparison of the two modes would mean nothing."""
    jobs = []
    for privacy in ("private", "open"):
        frames = run("llama", privacy).compnodes  # type: ignore[arg-type]
        (job,) = {header.job for header in decoded(frames, "train.weight_tensor", WeightTensor)}
        jobs.append(job)
    assert jobs[0] != jobs[1]
