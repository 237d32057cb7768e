"""Writes a checkpoint: tensors go to their places on disk as they arrive. The folder appears when all are there."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import msgspec

from fusionai.errors import CheckpointError, StorageError
from fusionai.tensor import TensorData
from fusionai.training.checkpoint.folders import newest_in, partial_of, replaced_of, restore
from fusionai.training.checkpoint.manifest import MANIFEST, FileRecord, Manifest, sealed
from fusionai.training.checkpoint.reader import SUFFIX, file_sha256
from fusionai.training.checkpoint.safetensors_format import Place, TensorSpec, make_header

log = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")

_SPARE_BYTES = 1 << 20
"""Bytes that the check of free space allows for files besides the weights (configuration, index, manifest)."""


class CheckpointWriter:
    """Writes one checkpoint into a hidden folder beside its final place. `commit` renames it, `abort` removes it.

    At most one tensor is in memory. A crash at any moment leaves earlier checkpoints as they were. All methods block.
    They may be called from any thread, and wait for each other.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Sequence[TensorSpec]]) -> None:
        """Lay out the shards. `specs` gives the tensors of each shard, by the shard's path inside the folder.

        Raises StorageError when the disk has not enough space, or cannot be written.
        """
        self._folder = folder
        self._partial = partial_of(folder)
        self._lock = threading.Lock()
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, dict[str, Place]] = {}
        self._weight_maps: dict[str, dict[str, str]] = {}
        self._index_sizes: dict[str, int] = {}
        headers: dict[str, bytes] = {}
        for shard, tensors in specs.items():
            _check_shard_name(shard)
            headers[shard], self._places[shard] = make_header(tensors)
            if match := _SHARD.fullmatch(shard):
                name = PurePosixPath(shard).name
                index = f"{match['stem']}.safetensors.index.json"
                self._weight_maps.setdefault(index, {}).update({spec.name: name for spec in tensors})
                size = sum(spec.nbytes for spec in tensors)
                self._index_sizes[index] = self._index_sizes.get(index, 0) + size
        self._missing = {(shard, name) for shard, places in self._places.items() for name in places}
        self._needed_bytes = sum(map(len, headers.values())) + sum(
            place.stop - place.start for places in self._places.values() for place in places.values()
        )
        self._state = "open"
        try:
            with self._refusals():
                self._open(headers)
        except BaseException:
            self.abort()
            raise

    def _open(self, headers: Mapping[str, bytes]) -> None:
        parent = self._folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        restore(self._folder)
        if self._partial.exists():
            shutil.rmtree(self._partial)
        if shutil.disk_usage(parent).free < self._needed_bytes + _SPARE_BYTES:
            raise StorageError(self._refusal("there is not enough space"))
        self._partial.mkdir()
        for shard, header in headers.items():
            path = self._partial / shard
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: each tensor is one write, so a refusal comes from the call that caused it.
            file = path.open("wb", buffering=0)
            self._files[shard] = file
            _write_all(file, header)
            file.truncate(max([len(header), *(place.stop for place in self._places[shard].values())]))

    def write(self, shard: str, name: str, tensor: TensorData) -> None:
        """Write one tensor to its place. Tensors may come in any order.

        Raises StorageError when the disk refuses, and CheckpointError when the tensor was not announced, is of
        another dtype or shape, or came already.
        """
        with self._lock:
            self._require_open()
            place = self._places.get(shard, {}).get(name)
            if place is None or (shard, name) not in self._missing:
                what = "was not announced" if place is None else "came twice"
                raise CheckpointError(f"tensor {name!r} for {shard} of the checkpoint {self._folder} {what}")
            if (place.dtype, place.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"tensor {name!r} should be {place.dtype}{list(place.shape)} and is "
                    f"{tensor.dtype}{list(tensor.shape)}; the checkpoint {self._folder} is given up"
                )
            with self._refusals():
                self._files[shard].seek(place.start)
                if tensor.nbytes:
                    _write_all(self._files[shard], memoryview(tensor.data).cast("B"))
            self._missing.discard((shard, name))

    def add_files(self, write_files: Callable[[Path], object]) -> None:
        """Let `write_files` put further files (config.json, tokenizer) into the folder that it is given.

        It must not touch the shards. Raises StorageError when the disk refuses.
        """
        with self._lock:
            self._require_open()
            with self._refusals():
                write_files(self._partial)

    def commit(self, manifest: Manifest) -> None:
        """Flush everything to the disk, then make the checkpoint appear. It replaces a checkpoint of the same name.

        Raises CheckpointError when a tensor has not come, and StorageError when the disk refuses. Call `abort` then.
        """
        with self._lock:
            self._require_open()
            if self._missing:
                shard, name = min(self._missing)
                raise CheckpointError(
                    f"{len(self._missing):,} tensors of the checkpoint {self._folder} have not come, "
                    f"the first being {name!r} of {shard}"
                )
            with self._refusals():
                for index, weight_map in self._weight_maps.items():
                    content = {"metadata": {"total_size": self._index_sizes[index]}, "weight_map": weight_map}
                    text = msgspec.json.format(msgspec.json.encode(content))
                    (self._partial / index).write_bytes(text + b"\n")
                self._close_files()
                (self._partial / MANIFEST).write_bytes(sealed(manifest, self._flushed_files()))
                _flush(self._partial / MANIFEST)
                for path in self._partial.rglob("*"):
                    if path.is_dir():
                        _flush_folder(path)
                _flush_folder(self._partial)
                self._appear()
            self._state = "committed"

    def _flushed_files(self) -> dict[str, FileRecord]:
        records = {}
        for path in sorted(self._partial.rglob("*")):
            if path.is_file():
                _flush(path)
                name = path.relative_to(self._partial).as_posix()
                records[name] = FileRecord(path.stat().st_size, file_sha256(path))
        return records

    def _appear(self) -> None:
        replaced = replaced_of(self._folder)
        if self._folder.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            self._folder.rename(replaced)
        try:
            self._partial.rename(self._folder)
        except OSError:
            restore(self._folder)
            raise
        _flush_folder(self._folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def abort(self) -> None:
        """Remove what was written. Does nothing after `commit`, or when called a second time."""
        with self._lock:
            if self._state != "open":
                return
            self._state = "aborted"
            with contextlib.suppress(OSError):
                self._close_files()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _close_files(self) -> None:
        while self._files:
            _, file = self._files.popitem()
            file.close()

    def _require_open(self) -> None:
        if self._state != "open":
            raise CheckpointError(f"the checkpoint {self._folder} is already {self._state}")

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn an error of the operating system into a StorageError with the needed and the free bytes."""
        try:
            yield
        except OSError as error:
            raise StorageError(self._refusal(error.strerror or str(error))) from error

    def _refusal(self, reason: str) -> str:
        existing = next((path for path in self._folder.parents if path.exists()), Path())
        try:
            free = f"{shutil.disk_usage(existing).free:,} bytes are free"
        except OSError:
            free = "the free space is unknown"
        kept = newest_in(self._folder.parent)
        last = f"the last good checkpoint is kept: {kept}" if kept else "there is no earlier checkpoint"
        return (
            f"the checkpoint {self._folder} cannot be written: {reason}; it needs {self._needed_bytes:,} bytes and "
            f"{free}. Free some space, or use another run folder, and resume; {last}"
        )


def _check_shard_name(shard: str) -> None:
    path = PurePosixPath(shard)
    if path.is_absolute() or ".." in path.parts or "\\" in shard or not shard.endswith(SUFFIX):
        raise ValueError(f"a shard must be named by a relative path that ends in {SUFFIX}, got {shard!r}")


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data`: an unbuffered write may take only a part (Linux: at most 2 GiB at once)."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _flush(path: Path) -> None:
    # Windows flushes only files that are open for writing, so a read-only file that somebody added is not flushed.
    with contextlib.suppress(PermissionError), path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make renames and new files of a folder durable, where the system can do so (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
