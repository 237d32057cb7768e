"""Reading weights and optimizer state from disk, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import msgspec

from fusionai.errors import CheckpointError
from fusionai.tensor import TensorData
from fusionai.training.checkpoint.manifest import REMEDY, Manifest, read_manifest
from fusionai.training.checkpoint.safetensors_format import Place, TensorSpec, read_header

SUFFIX = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer/"


class _TensorFiles:
    """The tensors of several safetensors files, by name."""

    def __init__(self, paths: Iterable[Path], remedy: str) -> None:
        self._remedy = remedy
        self._places: dict[str, tuple[Path, Place]] = {}
        for path in paths:
            for name, place in read_header(path).items():
                if name in self._places:
                    raise CheckpointError(f"tensor {name!r} is both in {self._places[name][0]} and in {path}; {remedy}")
                self._places[name] = (path, place)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the files."""
        return tuple(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def spec(self, name: str) -> TensorSpec:
        """Return name, dtype and shape of a tensor. Raises CheckpointError as `read` does."""
        path, place = self._find(name)
        if place.dtype is None:
            raise CheckpointError(
                f"tensor {name!r} in {path} has elements of type {place.word}, which FusionAI does not compute "
                "with; convert the model to float32, float16 or bfloat16"
            )
        return TensorSpec(name, place.dtype, place.shape)

    def read(self, name: str) -> TensorData:
        """Return one tensor; only its own bytes are read.

        Raises CheckpointError when there is none of that name, its element type is unknown, or its file changed.
        """
        spec = self.spec(name)
        path, place = self._places[name]
        data = bytearray(spec.nbytes)
        try:
            with path.open("rb") as file:
                file.seek(place.start)
                found = file.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if found != spec.nbytes:
            raise CheckpointError(f"{path} was cut short while it was in use; {self._remedy}")
        return TensorData(spec.dtype, spec.shape, data)

    def _find(self, name: str) -> tuple[Path, Place]:
        if name not in self._places:
            some = ", ".join(list(self._places)[:3])
            raise CheckpointError(
                f"tensor {name!r} is not among the {len(self._places):,} tensors on disk ({some}, ...): "
                "these are the weights of another model"
            )
        return self._places[name]


class CheckpointReader(_TensorFiles):
    """A checkpoint that FusionAI wrote: weights by key, optimizer state as "<key>::<state>"."""

    def __init__(self, folder: Path) -> None:
        """Check the manifest, the sizes of all files and the headers of the shards.

        Raises CheckpointError naming the file or tensor that is missing or damaged. `verify` checks the contents.
        """
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        shards = [name for name in self.manifest.files if name.endswith(SUFFIX)]
        super().__init__((folder / name for name in shards), REMEDY)
        self._optimizer = folder / OPTIMIZER

    @property
    def weights(self) -> tuple[str, ...]:
        """Keys of the model's weights."""
        return tuple(name for name, (path, _) in self._places.items() if path.parent != self._optimizer)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors."""
        return tuple(name for name, (path, _) in self._places.items() if path.parent == self._optimizer)

    def verify(self) -> None:
        """Read every file and compare its hash. Raises CheckpointError naming the first that differs."""
        for name, record in self.manifest.files.items():
            path = self.folder / name
            if file_sha256(path) != record.sha256:
                raise CheckpointError(f"{path} is damaged: its hash is not the one of the manifest; {REMEDY}")


class WeightFiles(_TensorFiles):
    """Weights of a folder in the Hugging Face layout, written by any program: one safetensors file, or several."""

    def __init__(self, folder: Path) -> None:
        """Find the files and read their headers. Raises CheckpointError naming the file that is missing or damaged."""
        remedy = "download or save the model again"
        self.folder = folder
        if (folder / SINGLE).is_file():
            super().__init__([folder / SINGLE], remedy)
            return
        index = folder / INDEX
        if not index.is_file():
            raise CheckpointError(_no_weights(folder))
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointError(f"{index} is damaged: {error}; {remedy}") from error
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(SUFFIX):
                raise CheckpointError(f"{index} names {shard!r}, which is no safetensors file beside it; {remedy}")
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard} is missing, and {INDEX} names it; {remedy}")
        super().__init__((folder / shard for shard in shards), remedy)
        for name, shard in weight_map.items():
            if name not in self or self._places[name][0].name != shard:
                raise CheckpointError(f"tensor {name!r} is not in {folder / shard}, where {INDEX} has it; {remedy}")


class _Index(msgspec.Struct):
    weight_map: Mapping[str, str]


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist; give the folder of a model"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{folder} has weights in pickle files only, which can run code when they are read; save the model with "
            "transformers' save_pretrained, which writes safetensors"
        )
    return f"{folder} holds no weights: neither {SINGLE} nor {INDEX}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises CheckpointError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
