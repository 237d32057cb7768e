"""Makes a job from a job file: loads the transformers model and its tokenizer, and packs the text."""

from __future__ import annotations

import logging
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from fusionai.errors import DataError, FusionError, StorageError
from fusionai.owner.checkpointing import CheckpointFiles
from fusionai.owner.model_configuration import (
    ALL_FILES,
    MODEL_CLASSES,
    cannot_be_made,
    captured_model,
    check_length,
    configuration,
    empty_model,
    model_folder,
    vocabulary_of,
)
from fusionai.owner.resuming import CheckpointWeights, check_same_model
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.training_job import TrainingJob
from fusionai.training.checkpoint import CheckpointReader, WeightFiles
from fusionai.training.config import JobConfig, to_toml
from fusionai.training.data.packed import PackedText, pack_documents
from fusionai.training.data.sources import text_documents
from fusionai.training.data.tokenizer import load_tokenizer, masking, train_tokenizer
from fusionai.training.weight_orders import WeightSource

log = logging.getLogger(__name__)


def prepare_language_model(job: JobConfig, folder: RunFolder, *, resume: CheckpointReader | None = None) -> TrainingJob:
    """Load or initialise the model of a job file, read its text, and capture it. Blocks for seconds to minutes.

    With `resume`, weights, optimizer state and tokenizer come from that checkpoint, the packed text from its run, and
    training goes on at its step. Of the run's files only the packed text is written here.

    Raises ConfigError, DataError, GraphError, CheckpointError or StorageError.
    """
    if resume is not None:
        resume.verify()
    source = resume.folder if resume is not None else model_folder(job.model, ALL_FILES)
    tokenizer = load_tokenizer(str(resume.folder)) if resume is not None else _tokenizer(job, source)
    config = configuration(job.model, job.data, vocabulary_of(tokenizer), source)
    if resume is None:
        pack_documents(text_documents(job.data.text, field=job.data.field), tokenizer, folder.text)
    else:
        _take_text(resume, folder)
    text = PackedText(
        folder.text,
        job.data.sequence_length,
        heldout_fraction=job.data.heldout_fraction,
        masking=masking(tokenizer) if job.model.task == "masked" else None,
    )
    model, weights = _model(job, config, source)
    check_length(model, job.data)
    evaluation = job.training.evaluation_batches > 0 and job.data.heldout_fraction > 0
    captured = captured_model(job, model, evaluation=evaluation)
    if resume is not None:
        check_same_model(captured.graph, job.optimizer, resume)
        weights = CheckpointWeights(resume, captured)
    saved = deepcopy(config)
    # Whoever opens the checkpoint reads from this what the model is for.
    saved.architectures = [type(model).__name__]

    def write_extra(path: Path) -> None:
        saved.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return TrainingJob(
        name=job.name,
        graph=captured.graph,
        weights=weights or captured,
        batches=text.batches(
            seed=job.training.seed,
            microbatches=job.training.microbatches,
            batch_size=job.training.batch_size,
            heldout_limit=job.training.evaluation_batches,
        ),
        files=CheckpointFiles(write_extra),
        tokens_per_step=job.training.batch_size * job.training.microbatches * job.data.sequence_length,
        description=to_toml(job),
        training=job.training,
        optimizer=job.optimizer,
        schedule=job.schedule,
        placement=job.placement,
        first_step=resume.manifest.step if resume is not None else 0,
    )


def _tokenizer(job: JobConfig, source: Path | None) -> Any:
    if job.data.tokenizer is not None:
        return load_tokenizer(job.data.tokenizer)
    if source is not None:
        return load_tokenizer(str(source))
    documents = text_documents(job.data.text, field=job.data.field)
    return train_tokenizer(documents, job.data.vocabulary_size)


def _take_text(resume: CheckpointReader, folder: RunFolder) -> None:
    """Have the text of the run that is resumed in the folder, which may be another run's.

    The text is not packed again: its source may have changed, and then other sequences would come next.
    """
    theirs = resume.folder.parent.parent / "data" / folder.text.name
    if not theirs.is_file():
        raise DataError(
            f"the packed text of the run is missing: {theirs}; put it back, or begin a new run with "
            f"model.path = {str(resume.folder)!r}"
        )
    if folder.text.exists() and folder.text.samefile(theirs):
        return
    partial = folder.text.with_name(f".{folder.text.name}.partial")
    try:
        folder.text.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            os.link(theirs, partial)  # nobody changes a packed text, so both runs can have one copy
        except OSError:
            shutil.copyfile(theirs, partial)
        partial.replace(folder.text)
    except OSError as error:
        raise StorageError(f"the packed text {theirs} cannot be copied to {folder.text}: {error}") from error


def _model(job: JobConfig, config: Any, source: Path | None) -> tuple[Any, WeightSource | None]:
    """Return the module to capture, and the source of its weights (None: the module holds them itself).

    Weights in files are read one at a time when they are sent out, so the model itself stays on the meta device. If the
    files use other names than the module, transformers loads and converts them.
    """
    kind = MODEL_CLASSES[job.model.task]
    try:
        if source is None:
            torch.manual_seed(job.training.seed)
            return kind.from_config(config), None
        model = empty_model(job, config)
        files = WeightFiles(source)
        needed = {name for name, _ in model.named_parameters()} | set(model.state_dict())
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        computed = {name for name, buffer in model.named_buffers() if name not in model.state_dict()}
        if needed - tied <= set(files.names) and not computed:
            return model, files
        log.info("the files of %s name weights otherwise than the model; transformers loads them", source)
        return kind.from_pretrained(source, dtype=torch.float32), None
    except FusionError:
        raise
    except Exception as error:
        # The same errors as for a model without weights, and too little memory as well.
        raise cannot_be_made(job.model, config, error) from error
