"""Checkpoints: other programs read them, one tensor is in memory at a time, and damage is found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusionai.errors import CheckpointError
from fusionai.tensor import ITEM_BYTES, TensorData
from fusionai.training.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    Manifest,
    TensorSpec,
    WeightFiles,
    latest,
    prune,
)

MANIFEST = Manifest(step=7, seed=3, job="tiny", graph_hash="abc")


def data(tensor: torch.Tensor) -> TensorData:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorData(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw)  # type: ignore[arg-type]


def specs(tensors: Mapping[str, TensorData]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


def small() -> dict[str, TensorData]:
    return {"a": TensorData("float32", (4,), bytes(16)), "b": TensorData("int64", (2,), b"\x01" * 16)}


def write(
    folder: Path, shards: Mapping[str, Mapping[str, TensorData]], manifest: Manifest = MANIFEST
) -> CheckpointReader:
    """Write a whole checkpoint, its tensors in an arbitrary order."""
    writer = CheckpointWriter(folder, {shard: specs(tensors) for shard, tensors in shards.items()})
    items = [(shard, name, tensor) for shard, tensors in shards.items() for name, tensor in tensors.items()]
    random.Random(0).shuffle(items)
    for item in items:
        writer.write(*item)
    writer.commit(manifest)
    return CheckpointReader(folder)


def step_folder(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    write(folder, {"model.safetensors": small()}, Manifest(step=step, seed=0, job="x", graph_hash="y"))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(found: TensorData, expected: TensorData) -> bool:
    return (found.dtype, found.shape, bytes(found.data)) == (expected.dtype, expected.shape, bytes(expected.data))


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in ITEM_BYTES:
        shape = (3, 5)
        values = torch.randint(0, 2 if dtype == "bool" else 100, shape, generator=generator)
        tensors[f"some.{dtype}"] = values.to(getattr(torch, dtype))
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors['odd ünicode "name" '] = torch.ones(1, dtype=torch.uint8)
    return tensors


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_dtype()
    reader = write(tmp_path / "c", {"model.safetensors": {name: data(each) for name, each in tensors.items()}})
    loaded = load_file(tmp_path / "c" / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
        assert same(reader.read(name), data(tensor))
    with safetensors.safe_open(tmp_path / "c" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    assert set(files.names) == tensors.keys()
    for name, tensor in tensors.items():
        assert same(files.read(name), data(tensor)), name
        assert files.spec(name).shape == tuple(tensor.shape)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def weights(model: torch.nn.Module) -> dict[str, TensorData]:
    """A model's weights, tied ones once."""
    return {name: data(tensor) for name, tensor in model.named_parameters()}


def in_shards(tensors: Mapping[str, TensorData], count: int) -> dict[str, dict[str, TensorData]]:
    parts = [dict(list(tensors.items())[index::count]) for index in range(count)]
    if count == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{index:05d}-of-{count:05d}.safetensors": part for index, part in enumerate(parts, 1)}


@pytest.mark.parametrize("count", [1, 3])
def test_transformers_opens_a_checkpoint_and_computes_the_same(
    tmp_path: Path, llama: LlamaForCausalLM, count: int
) -> None:
    shards = in_shards(weights(llama), count)
    states = {f"{name}::exp_avg": tensor for name, tensor in weights(llama).items()}
    everything = shards | {"optimizer/state.safetensors": states}
    writer = CheckpointWriter(tmp_path / "c", {shard: specs(tensors) for shard, tensors in everything.items()})
    for shard, tensors in everything.items():
        for name, tensor in tensors.items():
            writer.write(shard, name, tensor)
    writer.add_files(llama.config.save_pretrained)
    writer.commit(MANIFEST)

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, llama(tokens).logits)

    reader = CheckpointReader(tmp_path / "c")
    reader.verify()
    assert set(reader.weights) == weights(llama).keys()
    assert set(reader.states) == states.keys()
    assert "config.json" in reader.manifest.files
    plain = WeightFiles(tmp_path / "c")
    for name, tensor in weights(llama).items():
        assert same(reader.read(name), tensor)
        assert same(reader.read(f"{name}::exp_avg"), tensor)
        assert same(plain.read(name), tensor)
    assert not any("::" in name for name in plain.names)


def test_we_read_what_transformers_writes(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    files = WeightFiles(tmp_path)
    for name, tensor in weights(llama).items():
        assert same(files.read(name), tensor)


def test_an_index_says_the_total_size(tmp_path: Path) -> None:
    write(tmp_path / "c", in_shards(small(), 2))
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 32
    assert index["weight_map"].keys() == small().keys()


def test_the_manifest_says_what_the_checkpoint_is_of(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", {"model.safetensors": small()}).manifest
    assert (manifest.step, manifest.seed, manifest.job, manifest.graph_hash) == (7, 3, "tiny", "abc")
    assert json.loads((tmp_path / "c" / "fusionai.json").read_text())["format"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        from fusionai.tensor import TensorData
        from fusionai.training.checkpoint import CheckpointReader, CheckpointWriter, Manifest, TensorSpec
        scale = 1 if sys.platform == "darwin" else 1024
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        folder, count, size = Path(sys.argv[1]), 32, 8 << 20
        before = peak()
        shape = (size // 4,)
        specs = [TensorSpec(f"w{index}", "float32", shape) for index in range(count)]
        writer = CheckpointWriter(folder, {"model.safetensors": specs})
        for spec in reversed(specs):
            writer.write("model.safetensors", spec.name, TensorData("float32", shape, bytes(size)))
        writer.commit(Manifest(step=1, seed=0, job="x", graph_hash="y"))
        reader = CheckpointReader(folder)
        reader.verify()
        for spec in specs:
            reader.read(spec.name)
        print(peak() - before, count * size)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c")]
    grown, total = subprocess.run(command, capture_output=True, check=True, timeout=250).stdout.split()
    assert int(total) == 256 << 20
    assert int(grown) < 3 * (8 << 20)


# --- what must not be accepted -----------------------------------------------------------------------------------


def test_tensors_that_do_not_belong(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "c", {"model.safetensors": specs(small())})
    tensor = small()["a"]
    with pytest.raises(CheckpointError, match=r"'z' for model.safetensors .* was not announced"):
        writer.write("model.safetensors", "z", tensor)
    with pytest.raises(CheckpointError, match="was not announced"):
        writer.write("other.safetensors", "a", tensor)
    with pytest.raises(CheckpointError, match=r"should be float32\[4\] and is float32\[2, 2\]"):
        writer.write("model.safetensors", "a", TensorData("float32", (2, 2), bytes(16)))
    with pytest.raises(CheckpointError, match=r"should be float32\[4\] and is int32\[4\]"):
        writer.write("model.safetensors", "a", TensorData("int32", (4,), bytes(16)))
    writer.write("model.safetensors", "a", tensor)
    with pytest.raises(CheckpointError, match="came twice"):
        writer.write("model.safetensors", "a", tensor)
    with pytest.raises(CheckpointError, match=r"1 tensors of .* have not come, the first being 'b'"):
        writer.commit(MANIFEST)
    writer.abort()
    assert names(tmp_path) == []
    with pytest.raises(CheckpointError, match="already aborted"):
        writer.write("model.safetensors", "b", small()["b"])


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "model.bin", "a\\b.safetensors"])
def test_shards_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        CheckpointWriter(tmp_path / "c", {name: []})


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    shards = {**in_shards(weights(llama), 2), "optimizer/state.safetensors": small()}
    write(tmp_path / "c", shards)
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert len(files) == 5
    generator = random.Random(0)
    for path in files:
        original = path.read_bytes()
        # The manifest is read by a JSON parser: try its every byte, as spaces and case are where damage could hide.
        whole = range(len(original)) if path.name == "fusionai.json" else ()
        places = {*whole, 0, 7, 8, 9, len(original) - 1, *(generator.randrange(len(original)) for _ in range(40))}
        undetected, unnamed = [], []
        for place in sorted(places):
            damaged = bytearray(original)
            damaged[place] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            try:
                CheckpointReader(tmp_path / "c").verify()
            except CheckpointError as error:
                if path.name not in str(error) and path.name != "fusionai.json":
                    unnamed.append(str(error))
            else:
                undetected.append((place, bytes(damaged[max(0, place - 5) : place + 5])))
        path.write_bytes(original)
        # A space between two JSON values may become another kind of white space: that changes nothing.
        meaningless = [each for each in undetected if each[1].isspace() or b"\n" in each[1] or b"  " in each[1]]
        assert undetected == meaningless
        assert unnamed == []
    CheckpointReader(tmp_path / "c").verify()


@pytest.mark.parametrize("size", [0, 3, 8, 20, -1])
def test_a_file_cut_short_is_found_on_opening(tmp_path: Path, size: int) -> None:
    write(tmp_path / "c", {"model.safetensors": small()})
    path = tmp_path / "c" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has [\d,]+ bytes and should have .*previous"):
        CheckpointReader(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        WeightFiles(tmp_path / "c")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "c")
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint: it has no fusionai\.json"):
        CheckpointReader(tmp_path / "c")
    with pytest.raises(CheckpointError, match="holds no weights"):
        WeightFiles(tmp_path / "c")
    (tmp_path / "c" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        WeightFiles(tmp_path / "c")
    reader = write(tmp_path / "d", {"model.safetensors": small()})
    with pytest.raises(CheckpointError, match="'x' is not among the 2 tensors on disk"):
        reader.read("x")
    (tmp_path / "d" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        CheckpointReader(tmp_path / "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b"\xff", "damaged"),
        (b'{"format": 2, "step": [1]}', "format 2, this FusionAI reads 1"),
        (b'{"format": 1}', "damaged.*step"),
        (b'{"format": 1, "step": 1, "seed": 0, "job": "x", "graph_hash": "y"}', "checksum"),
        (b"[" * 200_000, "damaged"),
    ],
)
def test_wrong_manifests(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "fusionai.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        header([]),
        header({"a": 3}),
        header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(8),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}) + bytes(8),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}) + bytes(8),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}) + bytes(8),
    ],
)
def test_malformed_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        WeightFiles(tmp_path)


def test_random_bytes_never_crash_the_reader(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    good = (tmp_path / "model.safetensors").read_bytes()
    generator = random.Random(1)
    refused = 0
    for _ in range(600):
        damaged = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "model.safetensors").write_bytes(damaged[: generator.randint(0, 2 * len(damaged))])
        try:
            files = WeightFiles(tmp_path)
            for name in files.names:
                files.read(name)
        except CheckpointError:
            refused += 1
    assert refused > 400


def test_an_element_type_we_do_not_compute_with(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "q": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    assert files.read("a").shape == (3,)
    with pytest.raises(CheckpointError, match=r"'q' .* F8_E4M3"):
        files.read("q")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "no safetensors file beside it"),
        ({"a": "model-00009-of-00009.safetensors"}, "is missing"),
        ({"a": "x.safetensors", "z": "x.safetensors"}, "'z' is not in"),
    ],
)
def test_wrong_indices(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        WeightFiles(tmp_path)


# --- a run's checkpoints -----------------------------------------------------------------------------------------


def test_latest_is_the_newest_complete_one(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    folders = [step_folder(tmp_path, step) for step in (9, 10, 1_000_000)]
    assert latest(tmp_path) == folders[2]
    (folders[2] / "model.safetensors").write_bytes(b"short")
    assert latest(tmp_path) == folders[1]
    (folders[1] / "fusionai.json").unlink()
    assert latest(tmp_path) == folders[0]
    (tmp_path / "checkpoints" / "step-x").mkdir()
    (tmp_path / "checkpoints" / ".step-000011.partial").mkdir()
    assert latest(tmp_path) == folders[0]


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    folders = {step: step_folder(tmp_path, step) for step in (1, 2, 3, 4, 5)}
    (folders[5] / "model.safetensors").unlink()
    leftovers = [".step-000002.partial", ".step-000001.removed"]
    for name in leftovers:
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert prune(tmp_path, 2) == [folders[2], folders[1]]
    assert names(tmp_path / "checkpoints") == ["notes.txt", "step-000003", "step-000004", "step-000005"]
    assert prune(tmp_path, 2) == []
    with pytest.raises(ValueError, match="at least one"):
        prune(tmp_path, 0)


def test_prune_never_leaves_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        (step_folder(tmp_path, step) / "fusionai.json").unlink()
    assert prune(tmp_path, 1) == []
    assert prune(tmp_path / "nothing", 1) == []


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 4)
    changed = {"a": TensorData("float32", (1,), b"\0\0\x80\x3f")}
    reader = write(folder, {"model.safetensors": changed})
    reader.verify()
    assert same(reader.read("a"), changed["a"])
    assert names(folder.parent) == ["step-000004"]


def test_a_crash_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 4)
    folder.rename(folder.with_name(".step-000004.replaced"))
    folder.with_name(".step-000004.partial").mkdir()
    assert latest(tmp_path) == folder
    CheckpointReader(folder).verify()


def test_abort_and_writes_in_flight_do_not_meet(tmp_path: Path) -> None:
    """A cancelled save aborts while a thread still writes."""
    count, size = 64, 1 << 18
    shape = (size,)
    layout = [TensorSpec(f"w{index}", "uint8", shape) for index in range(count)]
    writer = CheckpointWriter(tmp_path / "c", {"model.safetensors": layout})
    errors: list[BaseException] = []
    started = threading.Event()

    def write_all(each: Iterable[TensorSpec]) -> None:
        try:
            for spec in each:
                writer.write("model.safetensors", spec.name, TensorData("uint8", shape, bytes(size)))
                started.set()
        except BaseException as error:
            errors.append(error)

    parts: Sequence[Sequence[TensorSpec]] = [layout[::2], layout[1::2]]
    threads = [threading.Thread(target=write_all, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    started.wait(10)
    writer.abort()
    for thread in threads:
        thread.join(10)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert names(tmp_path) == []
    assert not any(thread.is_alive() for thread in threads)
