"""A job file against machines that nobody has joined yet: what `fusionai plan` and `fusionai simulate` do.

The model is made on the meta device and captured as for training, so the OP-DAG is the one that a broker would get; no
weights and no text are read.
"""

from __future__ import annotations

import time
from pathlib import Path

from fusionai.graph.encoding import content_hash
from fusionai.graph.privacy import arrange_private
from fusionai.owner.model_configuration import (
    CONFIGURATION_FILES,
    Vocabulary,
    captured_model,
    configuration,
    empty_model,
    model_folder,
    vocabulary_of,
)
from fusionai.scheduling.problem import PlanLimits, TrainingProblem
from fusionai.simulation.forecast.forecast import Forecast, forecast
from fusionai.simulation.forecast.request import Request, with_owner
from fusionai.simulation.forecast.simulated_job import SimulatedJob, SimulationOptions, simulate_on_pool
from fusionai.simulation.hardware.what_if_pool import WhatIfPool
from fusionai.training.config import JobConfig
from fusionai.training.data.tokenizer import END_ID, load_tokenizer


def forecast_job(job: JobConfig, what_if: WhatIfPool, *, what_ifs: bool = True) -> Forecast:
    """Return a forecast of a job on a pool. Blocks for seconds, with large models and pools for half a minute.

    Without `what_ifs` neither single machines nor better pools are planned for, which takes most of that time.

    Raises:
        ConfigError: a field of the job is wrong, its configuration cannot be had, or the pool lacks an owner.
        DataError: the tokenizer of the job file cannot be loaded.
        GraphError: the model cannot become an OP-DAG, or cannot be cut privately.
        PlacementError: no plan meets the constraints; the text says what is missing.
    """
    with_owner(what_if, job.placement.privacy)  # refused before seconds are spent on the capture
    return forecast(request_of(job), what_if, job_steps=job.training.steps, what_ifs=what_ifs)


def simulate_job(
    job: JobConfig, what_if: WhatIfPool, given: SimulationOptions, *, pipelines: bool = False
) -> SimulatedJob:
    """Return what happens when a job's plan for a pool is executed. Blocks for seconds, with many steps for longer.

    `pipelines`: execute the best plan of many pipelines, which the runtime does not run yet.

    Raises as `forecast_job`.
    """
    with_owner(what_if, job.placement.privacy)
    return simulate_on_pool(
        request_of(job),
        what_if,
        given,
        job_steps=job.training.steps,
        pipelines=pipelines,
        clock_s=time.perf_counter,
    )


def request_of(job: JobConfig) -> Request:
    """Return the request that planners get for a job: the graph is captured and arranged as in training."""
    source = model_folder(job.model, CONFIGURATION_FILES)
    config = configuration(job.model, job.data, _vocabulary(job, source), source)
    graph = captured_model(job, empty_model(job, config), evaluation=False).graph
    front, back = 0, len(graph.nodes)
    if job.placement.privacy == "private":
        graph, front, back = arrange_private(graph)
    training, tokens = job.training, (job.training.batch_size, job.data.sequence_length)
    return Request(
        problem=TrainingProblem(
            graph=graph,
            graph_hash=content_hash(graph),
            # Every symbol is an axis of a batch of token sequences.
            sizes={symbol: tokens[axis] for symbol, (_, axis) in graph.symbols.items()},
            microbatches=training.microbatches,
            optimizer_states=len(job.optimizer.states),
            precision=training.precision,
            privacy=job.placement.privacy,
            front=front,
            back=back,
            limits=PlanLimits(compnodes=job.placement.compnodes, cuts=job.placement.cuts),
        ),
        tokens_per_step=training.batch_size * training.microbatches * job.data.sequence_length,
        machines=job.placement.machines,
    )


def _vocabulary(job: JobConfig, source: Path | None) -> Vocabulary | None:
    """Return the vocabulary to plan for: from the configuration, else from the named tokenizer, else of a new one.

    A tokenizer trained on a short text may get fewer tokens than its limit; the plan then counts too many.
    """
    if source is not None:
        return None
    size = (job.model.config or {}).get("vocab_size")
    if size is None and job.data.tokenizer is not None:
        return vocabulary_of(load_tokenizer(job.data.tokenizer))
    # A wrong kind of vocab_size is for transformers to refuse.
    found = size if isinstance(size, int) else job.data.vocabulary_size
    return Vocabulary(found, END_ID, END_ID, END_ID)
