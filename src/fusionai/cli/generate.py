"""`fusionai generate`: sample text from a checkpoint, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("generate", help="sample text from a checkpoint")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, or a run folder for its newest one")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens to add (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from fusionai.cli.console import console, print_result
    from fusionai.owner.sampling import sample

    text = sample(
        arguments.checkpoint,
        arguments.prompt,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    if not arguments.json:
        console(arguments).print(text, markup=False, highlight=False)
    print_result(arguments, {"prompt": arguments.prompt, "text": text})
    return 0
