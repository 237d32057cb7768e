"""A masked language model and an open job: a small BERT guesses hidden letters.

Run it with `python examples/train_masked_lm.py`. With `privacy="open"` the compnodes run the embedding and the head as
well, so they see the text and the labels: for public data only.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import fusionai

LENGTH = 48
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
MASK = len(LETTERS)
IGNORED = -100  # a label that does not count in the loss
SUBJECTS = ("the owner", "a provider", "the broker", "one compnode", "every stage", "the driver")
VERBS = ("sends", "holds", "measures", "commits", "plans", "checks")
OBJECTS = ("a gradient.", "the weights.", "one microbatch.", "a link.", "the next step.", "a checkpoint.")


def batch(step: int, index: int) -> dict[str, Tensor]:
    """Return 16 rows of sentences with about one letter in six hidden; a pure function of step and index."""
    generator = torch.Generator().manual_seed(1_000 * step + index)
    rows = []
    for _ in range(16):
        text = ""
        while len(text) < LENGTH:
            chosen = torch.randint(0, 6, (3,), generator=generator).tolist()
            words = (part[place] for part, place in zip((SUBJECTS, VERBS, OBJECTS), chosen, strict=True))
            text += " ".join(words) + " "
        rows.append([LETTERS.index(letter) for letter in text[:LENGTH]])
    ids = torch.tensor(rows)
    hidden = torch.rand(ids.shape, generator=generator) < 0.16
    hidden[:, index % LENGTH] = True  # at least one in each row
    return {"input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, IGNORED)}


def main() -> None:
    """Train, then show a row with hidden letters and what the model puts in their place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--run", help="run folder (default: a new one under runs)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(LETTERS) + 1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.05,  # a net this narrow starts faster with larger weights than BERT's
        )
    )
    with fusionai.local_pool(compnodes=2) as pool:
        result = fusionai.train(
            model,
            batch,
            broker=pool.token,
            privacy="open",
            compnodes=2,
            steps=arguments.steps,
            microbatches=2,
            learning_rate=3e-3,
            gradient_clip=1.0,
            run=arguments.run,
        )
    print(f"trained on {', '.join(result.compnodes)}: loss {result.first_loss:.3f} -> {result.final_loss:.3f}")

    model.eval()
    fresh = batch(1_000_000, 0)
    with torch.no_grad():
        guessed = model(fresh["input_ids"]).logits[..., :MASK].argmax(dim=-1)
    hidden = fresh["labels"] != IGNORED
    filled = torch.where(hidden, guessed, fresh["input_ids"])
    print("given:  ", "".join((LETTERS + "_")[letter] for letter in fresh["input_ids"][0]))
    print("guessed:", "".join(LETTERS[letter] for letter in filled[0]))
    right = (guessed == fresh["labels"])[hidden].float().mean()
    print(f"{right:.0%} of {int(hidden.sum())} hidden letters are right")


if __name__ == "__main__":
    main()
