"""The Python API: train any `nn.Module` with a loss on a pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fusionai.errors import CheckpointError, ConfigError, DataError
from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.capture import Captured, Role, capture, capture_transformers
from fusionai.graph.loss_shares import LossShare
from fusionai.graph.model import OpDag
from fusionai.owner.checkpointing import CheckpointFiles
from fusionai.owner.interrupts import run_interruptibly
from fusionai.owner.membership import OwnerOptions, joined
from fusionai.owner.resuming import CheckpointWeights, check_same_model, has_job_file, newest_checkpoint
from fusionai.owner.run_folder import open_run
from fusionai.owner.stop_request import StopRequest
from fusionai.owner.training_job import Observer, TrainingJob, TrainingResult
from fusionai.owner.training_run import train as train_job
from fusionai.training.checkpoint import CheckpointReader
from fusionai.training.config import PlacementConfig, TrainingConfig, tables_to_toml
from fusionai.training.data.batches import TensorBatches
from fusionai.training.learning_rate import ScheduleConfig

TensorBatch = Mapping[str, torch.Tensor]
BatchFunction = Callable[[int, int], TensorBatch]

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
    loss_share: LossShare = "auto",
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
    checkpoint_minutes: float = 10.0,
    run: Path | str | None = None,
    resume: Path | str | None = None,
    name: str = "",
    owner: OwnerOptions | None = None,
    observer: Observer | None = None,
) -> TrainingResult:
    """Train `module` on a pool and put the trained weights back into it. Blocks.

    When called in the main thread, Ctrl-C and SIGTERM end the step under way, write a checkpoint and raise
    KeyboardInterrupt, whose text names the checkpoint. A second Ctrl-C does not wait for the step. SIGTERM is left to
    the program if that has a handler of its own. Whatever is raised, the module's weights are as they were before:
    `load_weights` puts those of a checkpoint into it.

    Args:
        module: returns a scalar loss, `(loss, ...)` or something with a `loss`; or give `loss`. Language models from
            transformers are recognised and captured with attention as one operator.
        batch: microbatch `index` of `step` as tensors by argument name. Must be a pure function of both, and give equal
            shapes every time.
        broker: join token of the pool.
        loss: `loss(output, labels)`, where the module does not compute it.
        roles: what inputs are; "labels" by default for `labels`, "tokens" for `input_ids`, else "data". Values of every
            input are fed as they are, positions too; with the role "positions" each stage counts 0..T-1 itself, and
            other values are refused.
        steps, microbatches: length, and portions of a step; the step's loss is that of all its samples together.
        learning_rate, optimizer, schedule, gradient_clip: as in a job file; no schedule and no clipping by default.
        loss_share: what a microbatch counts for in a step. "auto": what the loss says; where that cannot be told, as
            much as any other, and the plan says so. "labels": by its labels that count. "equal": as any other.
        precision: "bf16" computes under autocast; weights stay in fp32.
        privacy: "private" keeps every operator that touches raw inputs or labels on this machine, so these are not
            sent. A compnode can reconstruct them all the same: use machines that you trust, or data that may be read.
        compnodes: how many to use; 0: as many as serve best.
        cuts: cut positions, or a function from the OP-DAG to one, instead of the planner's.
        machines: names of the only compnodes to use. With `cuts`, they take the shares in this order.
        replan: whether the job may go over to a better plan when a machine becomes slower or faster than planned.
        seed: of dropout.
        heldout: microbatches to evaluate on as after `module.eval()`, every `evaluate_every` steps and at the end.
            Without them the module is captured in training mode only.
        checkpoint_every: steps between checkpoints; one is always made at the end.
        checkpoint_minutes: minutes after which a checkpoint is due when none was made; 0: none by time.
        run: run folder; by default a new one under "runs". It must not hold another run.
        resume: a run folder to go on from, in place or in `run`. Weights and the optimizer's state come from its newest
            checkpoint, which must hold exactly those of this module and this optimizer; `steps` counts the steps done
            before. Everything else is as given here, for the steps that are left: the loss, the data, the seed and all
            other arguments may be others than before.
        name: for people.
        owner: how this machine takes part; its `token` is `broker`.
        observer: hears of every step.

    Raises:
        UserError, PlacementError, NetworkError, StorageError, JobError: see `fusionai.errors`.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    title = name or type(module).__name__
    old, new = (None if each is None else Path(each) for each in (resume, run))
    reader = newest_checkpoint(old, steps=steps) if old is not None else None
    options = owner or OwnerOptions(token=broker)
    if options.token != broker:
        raise ConfigError("owner.token and broker are two different tokens; give one")
    with open_run(new, old, name=title) as folder:
        if old is not None and folder.path == old and has_job_file(old):
            raise ConfigError(
                f"the run {old} was made from a job file: go on with it by `fusionai train --resume`, or give `run` "
                "another folder to go on in"
            )
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
            loss_share=loss_share,
            precision=precision,
            seed=seed,
            evaluate_every=evaluate_every,
            evaluation_batches=len(heldout),
            checkpoint_every=checkpoint_every,
            checkpoint_minutes=checkpoint_minutes,
        )
        chosen = optimizer or OptimizerConfig()
        placement = PlacementConfig(
            privacy=privacy,
            compnodes=compnodes,
            cuts=tuple(cuts) if cuts is not None else None,
            machines=tuple(machines),
            replan=replan,
        )
        if old is not None:
            # Again, now that no other owner can train in it: the one before may have gone on meanwhile.
            reader = newest_checkpoint(old, steps=steps)
            reader.verify()
            check_same_model(captured.graph, chosen, reader)
        job = TrainingJob(
            name=title,
            graph=captured.graph,
            weights=CheckpointWeights(reader, captured) if reader is not None else captured,
            batches=TensorBatches(batch, heldout, names=example),
            files=CheckpointFiles(_transformers_files(module)),
            tokens_per_step=microbatches * _items(captured.graph, example),
            description="# Trained through the Python API: the model and the data are in a program.\n"
            + tables_to_toml(name=title, training=training, optimizer=chosen, schedule=schedule, placement=placement),
            training=training,
            optimizer=chosen,
            schedule=schedule,
            placement=placement,
            first_step=reader.manifest.step if reader is not None else 0,
            python=True,
        )

        async def main(stop: StopRequest) -> TrainingResult:
            async with joined(options) as member:
                return await train_job(job, member, folder, stop, observer)

        result = run_interruptibly(main, folder, python=True)
        load_weights(module, Path(result.checkpoint))
    return result


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
    usual = {"input_ids": "tokens", "labels": "labels"}
    chosen = {name: role for name, role in (roles or {}).items() if usual.get(name) != role}
    if loss is None and not chosen and set(example) == set(usual) and _is_transformers(module):
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
