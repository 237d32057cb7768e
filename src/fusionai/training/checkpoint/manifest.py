"""The manifest of a checkpoint: its job, its graph, its step, and the size and hash of every file in it."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import msgspec

from fusionai.errors import CheckpointError

MANIFEST = "fusionai.json"
FORMAT = 1

REMEDY = "delete that checkpoint and go on from the previous one of the run"


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `fusionai.json`. The writer fills in `files` and `checksum`."""

    format: int = FORMAT
    step: int
    """Training steps done."""
    seed: int
    job: str
    """The job's name."""
    graph_hash: str
    """Content hash of the OP-DAG that was trained."""
    files: dict[str, FileRecord] = {}
    """Files by path inside the folder, with "/" between parts. The manifest itself is not among them."""
    checksum: str = ""
    """SHA-256 of this manifest with an empty checksum. It shows damage to the manifest itself."""


def sealed(manifest: Manifest, files: dict[str, FileRecord]) -> bytes:
    """Return the text of `fusionai.json` for a manifest with these files."""
    filled = msgspec.structs.replace(manifest, files=files, checksum="")
    text = msgspec.json.encode(msgspec.structs.replace(filled, checksum=_checksum(filled)))
    return msgspec.json.format(text) + b"\n"


def _checksum(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, checksum=""))).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, and that its files are there at their sizes.

    Raises CheckpointError naming the file that is missing, cut short or damaged.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        missing = "does not exist" if not folder.is_dir() else f"is no checkpoint: it has no {MANIFEST}"
        raise CheckpointError(f"{folder} {missing}; give the folder of a checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        # Check the format first: a newer one may have fields of other types.
        found = msgspec.json.decode(text, type=_Format).format
        manifest = msgspec.json.decode(text, type=Manifest) if found == FORMAT else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {REMEDY}") from error
    if manifest is None:
        raise CheckpointError(f"{path} has format {found}, this FusionAI reads {FORMAT}; use the version that wrote it")
    if manifest.checksum != _checksum(manifest):
        raise CheckpointError(f"{path} is damaged: its checksum does not match; {REMEDY}")
    for name, record in manifest.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise CheckpointError(f"{path} names {name!r}, a file outside the checkpoint; do not use it")
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{folder / name} is missing ({error.strerror or error}); {REMEDY}") from error
        if size != record.size_bytes:
            raise CheckpointError(f"{folder / name} has {size:,} bytes and should have {record.size_bytes:,}; {REMEDY}")
    return manifest


class _Format(msgspec.Struct):
    format: int
