"""The Python API: train any `nn.Module` with a loss on a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fusionai.errors import CheckpointError, ConfigError, DataError
from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.capture import Captured, capture, capture_transformers
from fusionai.graph.model import OpDag
from fusionai.network.loop import run as run_loop
from fusionai.owner.checkpointing import CheckpointFiles
from fusionai.owner.membership import OwnerOptions, joined
from fusionai.owner.resuming import CheckpointWeights, check_same_graph, newest_checkpoint
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.training_job import Observer, TrainingJob, TrainingResult
from fusionai.owner.training_run import train as train_job
from fusionai.training.checkpoint import CheckpointReader
from fusionai.training.config import PlacementConfig, TrainingConfig
from fusionai.training.data.batches import TensorBatches
from fusionai.training.learning_rate import ScheduleConfig

TensorBatch = Mapping[str, torch.Tensor]
BatchFunction = Callable[[int, int], TensorBatch]
Role = Literal["tokens", "labels", "positions", "data"]

CONSTANT_RATE = ScheduleConfig(kind="constant")


def train(
    module: nn.Module,
    batch: BatchFunction,
    *,
    broker: str,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    roles: Mapping[str, Role] | None = None,
    steps: int = 100,
    microbatches: int = 1,
    learning_rate: float = 1e-3,
    optimizer: OptimizerConfig | None = None,
    schedule: ScheduleConfig = CONSTANT_RATE,
    gradient_clip: float = 0.0,
    precision: Literal["fp32", "bf16"] = "fp32",
    privacy: Literal["private", "open"] = "private",
    compnodes: int = 0,
    cuts: Sequence[int] | Callable[[OpDag], int] | None = None,
    machines: Sequence[str] = (),
    replan: bool = True,
    seed: int = 0,
    heldout: Sequence[TensorBatch] = (),
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    run: Path | str | None = None,
    resume: Path | str | None = None,
    name: str = "",
    owner: OwnerOptions | None = None,
    observer: Observer | None = None,
) -> TrainingResult:
    """Train `module` on a pool and put the trained weights back into it. Blocks.

    Args:
        module: returns a scalar loss, `(loss, ...)` or something with a `loss`; or give `loss`. Language models from
            transformers are recognised and captured with attention as one operator.
        batch: microbatch `index` of `step` as tensors by argument name. Must be a pure function of both, and give equal
            shapes every time.
        broker: join token of the pool.
        loss: `loss(output, labels)`, where the module does not compute it.
        roles: what inputs are; "labels" by default for `labels`, "tokens" for `input_ids`, else "data".
        steps, microbatches: length, and portions of a step; the step's loss is the mean over all counted labels, or
            over microbatches where labels are no class numbers.
        learning_rate, optimizer, schedule, gradient_clip: as in a job file; no schedule and no clipping by default.
        precision: "bf16" computes under autocast; weights stay in fp32.
        privacy: "private" keeps every operator that touches raw inputs or labels on this machine.
        compnodes: how many to use; 0: as many as serve best.
        cuts: cut positions, or a function from the OP-DAG to one, instead of the planner's.
        machines: names of the only compnodes to use. With `cuts`, they take the shares in this order.
        replan: whether the job may go over to a better plan when a machine becomes slower or faster than planned.
        seed: of dropout.
        heldout: microbatches to evaluate on as after `module.eval()`, every `evaluate_every` steps and at the end.
            Without them the module is captured in training mode only.
        checkpoint_every: steps between checkpoints; one is always made at the end.
        run: run folder; by default a new one under "runs".
        resume: a run folder to go on from, with the optimizer's state.
        name: for people.
        owner: how this machine takes part; its `token` is `broker`.
        observer: hears of every step.

    Raises:
        UserError, PlacementError, NetworkError, StorageError, JobError: see `fusionai.errors`.
    """
    title = name or type(module).__name__
    folder = _folder(run, resume, title)
    checkpoint = newest_checkpoint(Path(resume)) if resume is not None else None
    options = owner or OwnerOptions(token=broker)
    if options.token != broker:
        raise ConfigError("owner.token and broker are two different tokens; give one")
    example = dict(batch(0, 0))
    captured = _capture(module, example, loss, roles, title, evaluation=bool(heldout))
    if callable(cuts):
        cuts = (cuts(captured.graph),)
    training = TrainingConfig(
        steps=steps,
        batch_size=max(1, _first_axis(example)),
        microbatches=microbatches,
        learning_rate=learning_rate,
        gradient_clip=gradient_clip,
        precision=precision,
        seed=seed,
        evaluate_every=evaluate_every,
        evaluation_batches=len(heldout),
        checkpoint_every=checkpoint_every,
    )
    reader = CheckpointReader(checkpoint) if checkpoint is not None else None
    if reader is not None:
        reader.verify()
        check_same_graph(captured.graph, reader)
    job = TrainingJob(
        name=title,
        graph=captured.graph,
        weights=CheckpointWeights(reader, captured) if reader is not None else captured,
        batches=TensorBatches(batch, heldout),
        files=CheckpointFiles(_transformers_files(module)),
        tokens_per_step=microbatches * _items(captured.graph, example),
        description=f'name = "{title}"\n# submitted through the Python API\n',
        training=training,
        optimizer=optimizer or OptimizerConfig(),
        schedule=schedule,
        placement=PlacementConfig(
            privacy=privacy,
            compnodes=compnodes,
            cuts=tuple(cuts) if cuts is not None else None,
            machines=tuple(machines),
            replan=replan,
        ),
        first_step=reader.manifest.step if reader is not None else 0,
    )
    result = run_loop(_train(job, options, folder, observer))
    load_weights(module, Path(result.checkpoint))
    return result


async def _train(
    job: TrainingJob, options: OwnerOptions, folder: RunFolder, observer: Observer | None
) -> TrainingResult:
    async with joined(options) as member:
        await asyncio.to_thread(folder.write, "job.toml", job.description)
        return await train_job(job, member, folder, observer)


def _folder(run: Path | str | None, resume: Path | str | None, name: str) -> RunFolder:
    chosen = run if run is not None else resume
    return RunFolder(Path(chosen)) if chosen is not None else RunFolder.fresh(Path("runs"), name)


def _capture(
    module: nn.Module,
    example: TensorBatch,
    loss: Callable[[Any, Any], torch.Tensor] | None,
    roles: Mapping[str, Role] | None,
    name: str,
    *,
    evaluation: bool,
) -> Captured:
    if not example:
        raise DataError("batch(0, 0) is empty; return tensors by the names of the module's arguments")
    if loss is None and set(example) == {"input_ids", "labels"} and _is_transformers(module):
        masked = "MaskedLM" in type(module).__name__
        model: Any = module
        return capture_transformers(model, "masked" if masked else "causal", name=name, evaluation=evaluation)
    return capture(module, example, loss=loss, roles=roles, name=name, evaluation=evaluation)


def _is_transformers(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _transformers_files(module: nn.Module) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if _is_transformers(module):
            config: Any = module.config
            config.save_pretrained(folder)

    return write


def _first_axis(example: TensorBatch) -> int:
    return max((tensor.shape[0] for tensor in example.values() if tensor.ndim), default=1)


def _items(graph: OpDag, example: TensorBatch) -> int:
    """Return the tokens of a microbatch, or its samples where it has no tokens."""
    tokens = [item.name for item in graph.inputs if item.role == "tokens"]
    return example[tokens[0]].numel() if tokens else _first_axis(example)


def load_weights(module: nn.Module, checkpoint: Path) -> None:
    """Copy the weights of a checkpoint into a module of the same kind, in place; tied weights stay tied.

    Raises CheckpointError when the checkpoint is damaged, has a weight that the module lacks, or in another shape.
    """
    reader = CheckpointReader(checkpoint)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for key in reader.weights:
        shape = reader.spec(key).shape
        if key not in named or tuple(named[key].shape) != shape:
            found = list(named[key].shape) if key in named else "missing"
            raise CheckpointError(f"weight {key!r} is {list(shape)} in {checkpoint}, but {found} in the module")
    with torch.no_grad():
        for key in reader.weights:
            data = reader.read(key)
            if data.nbytes:
                flat = torch.frombuffer(data.data, dtype=getattr(torch, data.dtype))
                named[key].copy_(flat.reshape(data.shape))
