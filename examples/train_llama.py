"""A transformers model from a configuration: a small Llama learns to write Python, byte by byte.

Run it with `python examples/train_llama.py`. A private job: token ids, labels and logits stay in this process, and the
compnodes see the hidden states between, from which they could reconstruct the text. For a tokenizer, packed text and a
job file see `jobs/llama.toml`.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fusionai

LENGTH = 96
MODULES = ("argparse.py", "ast.py", "dataclasses.py", "functools.py", "inspect.py", "pathlib.py", "typing.py")


def source_bytes() -> Tensor:
    """Return the source of some modules of Python's standard library as one row of bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = b"".join(path.read_bytes() for path in map(folder.joinpath, MODULES) if path.is_file())
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()


def main() -> None:
    """Train, then let the trained model continue a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--run", help="run folder (default: a new one under runs)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    text = source_bytes()
    training, heldout = text[: -8 * LENGTH], text[-8 * LENGTH :].reshape(8, LENGTH)

    def batch(step: int, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000 * step + index)
        starts = torch.randint(0, len(training) - LENGTH, (8,), generator=generator)
        ids = torch.stack([training[start : start + LENGTH] for start in starts.tolist()])
        return {"input_ids": ids, "labels": ids.clone()}  # the model shifts the labels itself

    with fusionai.local_pool(compnodes=2) as pool:
        result = fusionai.train(
            model,
            batch,
            broker=pool.token,
            steps=arguments.steps,
            microbatches=4,
            learning_rate=3e-3,
            gradient_clip=1.0,
            heldout=[{"input_ids": heldout, "labels": heldout.clone()}],
            run=arguments.run,
        )
    print(f"trained on {', '.join(result.compnodes)}: loss {result.first_loss:.3f} -> {result.final_loss:.3f}")
    print(f"held-out loss {result.heldout_loss:.3f}; {result.tokens_per_s:,.0f} tokens/s; {result.checkpoint}")

    prompt = torch.tensor([list(b"    def ")])
    written = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, do_sample=True, temperature=0.7
    )
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
