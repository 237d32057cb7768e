"""What `fusionai generate` continues, compared with transformers, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fusionai.errors import CheckpointError, ConfigError
from fusionai.owner.sampling import sample
from fusionai.training.data.tokenizer import train_tokenizer

POSITIONS = 24
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
TEXT = "alpha beta gamma delta\n" * 50


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([TEXT], 280)


def saved(folder: Path, kind: str, tokenizer: Any | None, *, task: str = "CausalLM", **fields: Any) -> Path:
    """Save a small model with its tokenizer as others would, and return its folder."""
    torch.manual_seed(3)
    sizes = {**SIZES, "vocab_size": len(tokenizer) if tokenizer is not None else 300, **fields}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    factory: Any = getattr(transformers, f"AutoModelFor{task}")
    factory.from_config(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def generate(folder: Path, prompt: str = "alpha", **options: Any) -> str:
    return sample(folder, prompt, **{"tokens": 4, "temperature": 0.0, "seed": 0, **options})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "llama", tokenizer)


def test_greedy_text_is_that_of_transformers(llama: Path, tokenizer: Any) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = tokenizer("alpha", return_tensors="pt").input_ids
    for _ in range(4):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
        if int(following) == tokenizer.eos_token_id:
            break
    assert generate(llama) == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_text_that_just_fits(llama: Path, tokenizer: Any) -> None:
    given = len(tokenizer("alpha").input_ids)
    room = POSITIONS - given
    assert generate(llama, tokens=room).startswith("alpha")
    words = (
        rf"the prompt has {given} tokens and --tokens asks for {room + 1} more, but the model has {POSITIONS} positions"
    )
    with pytest.raises(ConfigError, match=rf"{words}: ask for at most {room} \(--tokens {room}\)"):
        generate(llama, tokens=room + 1)
    with pytest.raises(ConfigError, match=f"has {POSITIONS} positions: give a shorter prompt"):
        generate(llama, "alpha beta gamma " * 20)


def test_roberta_counts_its_positions_from_behind_the_padding(tmp_path: Path, tokenizer: Any) -> None:
    folder = saved(tmp_path, "roberta", tokenizer, is_decoder=True, pad_token_id=1)
    given = len(tokenizer("alpha").input_ids)
    generate(folder, tokens=POSITIONS - 2 - given)
    with pytest.raises(ConfigError, match=f"the model has {POSITIONS - 2} positions"):
        generate(folder, tokens=POSITIONS - 1 - given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "--temperature must be 0 or from 0.001 to 1000, got -1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"temperature": 1e-30}, "got 1e-30"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 1 << 63}, "--seed must be from 0"),
        ({"prompt": "alpha \udcff"}, "--prompt is no valid text: character 7"),
    ],
)
def test_impossible_arguments(llama: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(llama, **options)


def test_an_empty_prompt_begins_a_text(llama: Path, tmp_path: Path, tokenizer: Any) -> None:
    assert generate(llama, "") == generate(llama, tokenizer.bos_token)
    bare = train_tokenizer([TEXT], 280)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ConfigError, match="--prompt is empty, and the tokenizer has no token to begin a text with"):
        generate(saved(tmp_path, "llama", bare, bos_token_id=None, eos_token_id=None), "")


@pytest.mark.parametrize("says_so", [True, False])
def test_a_masked_model(tmp_path: Path, tokenizer: Any, says_so: bool) -> None:
    """A checkpoint says what it is for; those of an older version do not."""
    folder = saved(tmp_path, "bert", tokenizer, task="MaskedLM")
    if not says_so:
        config = transformers.AutoConfig.from_pretrained(folder)
        config.architectures = None
        config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"holds a masked language model \((BertForMaskedLM|bert)\)"):
        generate(folder)


def test_a_decoder_of_a_masked_kind_is_causal(tmp_path: Path, tokenizer: Any) -> None:
    assert generate(saved(tmp_path, "bert", tokenizer, is_decoder=True)).startswith("alpha")


def test_an_encoder_decoder_model(tmp_path: Path, tokenizer: Any) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    folder = saved(tmp_path, "t5", tokenizer, task="Seq2SeqLM", **sizes)
    with pytest.raises(CheckpointError, match=r"holds an encoder-decoder model \(t5\)"):
        generate(folder)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    folder = saved(tmp_path, "llama", None)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.*tokenizer\.save_pretrained"):
        generate(folder)
    tokenizer.save_pretrained(folder)  # the remedy
    assert generate(folder).startswith("alpha")


def test_a_tokenizer_of_another_model(tmp_path: Path, tokenizer: Any) -> None:
    folder = saved(tmp_path, "llama", tokenizer, vocab_size=40)
    with pytest.raises(
        CheckpointError, match=rf"has {len(tokenizer)} tokens and the model 40: the prompt has token \d+"
    ):
        generate(folder)


def test_a_missing_weight_is_not_drawn_at_random(tmp_path: Path, tokenizer: Any) -> None:
    folder = saved(tmp_path, "llama", tokenizer)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weight 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        generate(folder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers(tmp_path: Path, tokenizer: Any, temperature: float) -> None:
    folder = saved(tmp_path, "llama", tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="computes logits that are no numbers"):
        generate(folder, temperature=temperature)
