"""Writes checkpoints of a running job: tensors go from each compnode straight to disk, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.encoding import content_hash
from fusionai.graph.evaluation import evaluated
from fusionai.graph.model import OpDag, Weight, WeightKey
from fusionai.graph.sizes import concrete
from fusionai.tensor import TensorData, tensor_bytes
from fusionai.training.checkpoint import CheckpointWriter, Manifest, TensorSpec
from fusionai.training.driver import Driver

SHARD_BYTES = 1 << 30
"""Size of the files that weights are split into, as in the Hugging Face format."""


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint contains besides the weights."""

    extra: Callable[[Path], None] = field(default=lambda folder: None)
    """Writes further files (config.json, tokenizer) into the folder."""


def _shards(weights: list[Weight], states: tuple[str, ...]) -> Mapping[str, list[TensorSpec]]:
    """Distribute weights, or with `states` their optimizer state, over safetensors files."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for weight in weights:
        shape = concrete(weight.type, {})
        names = [f"{weight.key}::{state}" for state in states] if states else [str(weight.key)]
        nbytes = tensor_bytes(weight.type.dtype, shape) * len(names)
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1] += [TensorSpec(name, weight.type.dtype, shape) for name in names]
        size += nbytes
    stem = "optimizer/state" if states else "model"
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


async def save_checkpoint(
    folder: Path,
    graph: OpDag,
    driver: Driver,
    files: CheckpointFiles,
    *,
    job: str,
    optimizer: OptimizerConfig,
    step: int,
    seed: int,
) -> None:
    """Collect a job's weights and optimizer state into `folder`, which appears only when it is complete.

    Raises StorageError when the disk refuses; earlier checkpoints stay as they are.
    """
    every = evaluated(graph).weights
    weights = list({each.key: each for each in every if each.kind != "constant"}.values())
    shards = dict(_shards(weights, ()))
    trainable = [each for each in weights if each.trainable]
    if optimizer.states and trainable:
        shards |= _shards(trainable, optimizer.states)
    place = {spec.name: shard for shard, specs in shards.items() for spec in specs}
    writer = await asyncio.to_thread(CheckpointWriter, folder, shards)

    async def sink(key: WeightKey, state: str | None, tensor: TensorData) -> None:
        name = str(key) if state is None else f"{key}::{state}"
        await asyncio.to_thread(writer.write, place[name], name, tensor)

    try:
        await driver.pull(optimizer.states, sink)
        await asyncio.to_thread(writer.add_files, files.extra)
        manifest = Manifest(step=step, seed=seed, job=job, graph_hash=content_hash(graph))
        await asyncio.to_thread(writer.commit, manifest)
    except BaseException:
        await asyncio.to_thread(writer.abort)
        raise
