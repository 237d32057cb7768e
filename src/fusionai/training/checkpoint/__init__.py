"""Checkpoints on disk: folders in the Hugging Face layout, written and read one tensor at a time."""

from fusionai.training.checkpoint.folders import latest, prune
from fusionai.training.checkpoint.manifest import FileRecord, Manifest
from fusionai.training.checkpoint.reader import CheckpointReader, WeightFiles
from fusionai.training.checkpoint.safetensors_format import TensorSpec
from fusionai.training.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "FileRecord",
    "Manifest",
    "TensorSpec",
    "WeightFiles",
    "latest",
    "prune",
]
