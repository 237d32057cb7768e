"""`fusionai demo`: a whole pool on this machine trains a small Llama, start to sample."""

from __future__ import annotations

import argparse
from pathlib import Path

STEPS = 80
COMPNODES = 3
PROMPT = "def main("


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("demo", help="train a small model on three local compnodes, end to end")
    parser.add_argument("--text", default="stdlib", help="text file, folder or .jsonl; default: Python's library")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--compnodes", type=int, default=COMPNODES)
    parser.add_argument("--run", type=Path, help="run folder (default: runs/demo-DATE)")
    parser.set_defaults(run_command=run)


def job(text: str, steps: int, compnodes: int) -> str:
    """Return the demo's job file."""
    import json

    return f"""
name = "demo"

[model.config]
model_type = "llama"
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 6
num_attention_heads = 6
num_key_value_heads = 3
max_position_embeddings = 512
tie_word_embeddings = true

[data]
text = {json.dumps(text)}
vocabulary_size = 2048
sequence_length = 128

[training]
steps = {steps}
batch_size = 4
microbatches = 4
learning_rate = 3e-3
seed = 1

[schedule]
warmup_steps = {min(10, steps // 4)}

[placement]
compnodes = {compnodes}
"""


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    import msgspec

    from fusionai.cli.console import console, print_result
    from fusionai.cli.progress import LiveProgress
    from fusionai.cli.stopping import leave_at_once
    from fusionai.errors import ConfigError
    from fusionai.owner.job_file import train_job
    from fusionai.owner.local_pool import LocalPool
    from fusionai.owner.membership import OwnerOptions
    from fusionai.owner.sampling import sample
    from fusionai.training.config import parse_job

    if arguments.compnodes < 1:
        raise ConfigError(f"--compnodes must be at least 1, got {arguments.compnodes}")
    parsed = parse_job(job(arguments.text, arguments.steps, arguments.compnodes), source="the demo's job")
    screen = console(arguments)
    screen.print(f"starting a broker and {arguments.compnodes} compnodes on this machine ...")
    with LocalPool(arguments.compnodes) as pool:
        screen.print("every compnode has joined")
        with LiveProgress(screen) as progress:
            owner = OwnerOptions(token=pool.token, device="cpu")
            result = train_job(
                parsed,
                owner,
                run=arguments.run,
                observer=progress,
                second_interrupt=lambda: leave_at_once(json_wanted=arguments.json),
            )
        screen.print(progress.summary())
    text = sample(Path(result.checkpoint), PROMPT, tokens=60, temperature=0.7, seed=0)
    screen.print(
        f"\nloss {result.first_loss:.3f} -> {result.final_loss:.3f} in {result.steps} steps, "
        f"{result.tokens_per_s:,.0f} tokens/s"
    )
    screen.print("\nsample:", style="bold")
    screen.print(text, markup=False, highlight=False)
    screen.print(f"\ncheckpoint: {result.checkpoint}", soft_wrap=True, highlight=False)
    print_result(arguments, {**msgspec.to_builtins(result), "sample": text})
    return 0
