"""The peers of `training_overhead.py`, each a process of its own that prints seconds per step.

    python benchmarks/peers_training.py plain --threads 2 --steps 12
    python benchmarks/peers_training.py pipelining --threads 1 --steps 12

`plain` is a PyTorch loop with gradient accumulation; `pipelining` is `torch.distributed.pipelining` with its 1F1B
schedule over gloo in two processes. Model, batches, optimizer and microbatches are those of FusionAI's runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import time
from typing import Any

import torch
import transformers

VOCABULARY = 2048
LAYERS = 8


def configuration() -> dict[str, Any]:
    """Return the benchmark's model: a Llama of 7 million parameters, small enough for two CPU cores."""
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }


def model(**changes: Any) -> Any:
    """Return the model, initialised from a fixed seed, with `changes` to its configuration."""
    torch.manual_seed(0)
    settings = configuration() | changes
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def tokens(step: int, index: int, batch_size: int, length: int) -> torch.Tensor:
    """Return the token ids of a microbatch, (batch_size, length) int64, as a function of its place."""
    generator = torch.Generator().manual_seed(step * 1009 + index)
    return torch.randint(0, VOCABULARY, (batch_size, length), generator=generator)


def plain(options: argparse.Namespace) -> list[float]:
    """Time steps of a plain loop."""
    torch.set_num_threads(options.threads)
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    positions = torch.arange(options.length).expand(options.batch_size, -1)
    seconds = []
    for step in range(options.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for index in range(options.microbatches):
            ids = tokens(step, index, options.batch_size, options.length)
            loss = network(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
            (loss / options.microbatches).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


class _Stage(torch.nn.Module):
    """Layers [start, stop) of the model, with the embedding in front or norm and head behind."""

    def __init__(self, network: Any, start: int, stop: int) -> None:
        super().__init__()
        inner = network.model
        self.embed = inner.embed_tokens if start == 0 else None
        self.layers = torch.nn.ModuleList(inner.layers[start:stop])
        self.rotary = inner.rotary_emb
        self.norm = inner.norm if stop == LAYERS else None
        self.head = network.lm_head if stop == LAYERS else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map ids (B, T) or hidden states (B, T, D) to hidden states, or to logits (B, T, V)."""
        if self.embed is not None:
            hidden = self.embed(hidden)
        positions = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, position_ids=positions, attention_mask=None)
        if self.norm is not None and self.head is not None:
            hidden = self.head(self.norm(hidden))
        return hidden


def _causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _rank(rank: int, port: int, options: argparse.Namespace, results: Any) -> None:
    from torch import distributed
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.set_num_threads(options.threads)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = LAYERS // 2
    part = _Stage(model(), 0, half) if rank == 0 else _Stage(model(), half, LAYERS)
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, options.microbatches, loss_fn=_causal_loss)
    seconds = []
    for step in range(options.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        parts = [tokens(step, index, options.batch_size, options.length) for index in range(options.microbatches)]
        ids = torch.cat(parts)
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=ids)
        optimizer.step()
        distributed.barrier()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        results.put(seconds)
    distributed.destroy_process_group()


def pipelining(options: argparse.Namespace) -> list[float]:
    """Time steps of torch.distributed.pipelining in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, options, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        seconds: list[float] = results.get(timeout=300)
    finally:
        for process in ranks:
            process.join(20)
            if process.is_alive():
                process.kill()
    return seconds


def main() -> None:
    """Run one peer and print its seconds per step as a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peer", choices=["plain", "pipelining"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    print(json.dumps({"plain": plain, "pipelining": pipelining}[options.peer](options)))


if __name__ == "__main__":
    main()
