"""Small random modules as Python source: what users write, drawn from a seed.

    case = draw_case(17)
    print(case.source)          # a file with Net, microbatch(), counted(), and perhaps loss()
    loaded = load(case, folder)

A case is its source and its settings, so a person can cut a failing one down by hand. Blocks are in `random_blocks`
and `random_pictures`, heads and losses in `random_losses`.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

Layout = str
"""Axes of the hidden state: "BTD" (sequences), "BD" (vectors), "BCHW" (pictures). The width is that of D or C."""


@dataclass(frozen=True)
class Case:
    """A module to train, and how."""

    seed: int
    source: str
    settings: Mapping[str, Any]
    features: tuple[str, ...]
    """What was drawn, for a summary of many cases."""


@dataclass(frozen=True)
class Loaded:
    """A case whose source has been executed."""

    case: Case
    make: Callable[[], nn.Module]
    """A new module with the case's first weights."""
    batch: Callable[[int, int], dict[str, torch.Tensor]]
    heldout: list[dict[str, torch.Tensor]]
    counted: Callable[[Mapping[str, torch.Tensor]], float | None]
    """What a microbatch counts for in a mean; None where the losses of microbatches are added."""
    loss: Callable[[Any, Any], torch.Tensor] | None


def load(case: Case, folder: Path) -> Loaded:
    """Write a case's source into a folder and execute it."""
    path = folder / f"module_{case.seed}.py"
    path.write_text(case.source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)

    def make() -> nn.Module:
        torch.manual_seed(case.seed)
        module: nn.Module = code.Net()
        return module.train()

    def batch(step: int, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100_000 * case.seed + 100 * step + index)
        found: dict[str, torch.Tensor] = code.microbatch(generator, index)
        return found

    heldout = [batch(999, index) for index in range(case.settings["heldout"])]
    return Loaded(case, make, batch, heldout, code.counted, getattr(code, "loss", None))


@dataclass
class Writer:
    """A module as it is written: the lines of `__init__` and `forward`, and the hidden state `h` at this place."""

    draw: random.Random
    layout: Layout = "BD"
    width: int = 0
    length: int | None = None
    """Of sequences where it is fixed; None: any."""
    size: int = 0
    """Height and width of pictures."""
    batch: int = 0
    """Samples in a microbatch."""
    example_length: int = 0
    """Of the sequences in microbatches, also where any length is possible."""
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    """Arguments of forward, with the expression that makes one microbatch of each from `g`, a generator."""
    roles: dict[str, str] = field(default_factory=dict)
    features: list[str] = field(default_factory=list)
    coupled: bool = False
    """Whether samples of a microbatch influence one another, or microbatches do by state."""
    embedding: str = ""
    """The token embedding, where there is one of the present width."""
    mask: str = ""
    """A boolean input (B, T), where there is one."""
    linears: list[tuple[str, int, int]] = field(default_factory=list)
    """Linear layers so far: name, inputs, outputs."""
    _numbers: dict[str, int] = field(default_factory=dict)

    def name(self, stem: str) -> str:
        """Return a new name."""
        self._numbers[stem] = self._numbers.get(stem, 0) + 1
        return f"{stem}{self._numbers[stem]}"

    def own(self, stem: str, made: str) -> str:
        """Have `__init__` keep something, and return how forward refers to it."""
        name = self.name(stem)
        self.init.append(f"self.{name} = {made}")
        return f"self.{name}"

    def parameter(self, *shape: int, scale: float = 0.3, stem: str = "weight") -> str:
        """Keep a parameter of random numbers."""
        shown = ", ".join(map(str, shape))
        return self.own(stem, f"nn.Parameter({scale} * torch.randn({shown}))")

    def buffer(self, made: str, *, stem: str = "buffer", persistent: bool = True) -> str:
        """Register a buffer."""
        name = self.name(stem)
        self.init.append(f'self.register_buffer("{name}", {made}{"" if persistent else ", persistent=False"})')
        return f"self.{name}"

    def linear(self, inputs: int, outputs: int, *, bias: bool | None = None) -> str:
        """Keep a linear layer."""
        bias = self.draw.random() < 0.7 if bias is None else bias
        name = self.own("linear", f"nn.Linear({inputs}, {outputs}{'' if bias else ', bias=False'})")
        self.linears.append((name, inputs, outputs))
        return name

    def say(self, *lines: str) -> None:
        """Add lines to forward."""
        self.body += lines

    def note(self, feature: str) -> None:
        """Note what was drawn."""
        self.features.append(feature)

    def chance(self, probability: float) -> bool:
        """Return whether something of this probability is so."""
        return self.draw.random() < probability

    def pick(self, *choices: Any) -> Any:
        """Return one of these."""
        return self.draw.choice(choices)


_HEADER = '''"""Module {seed} of tests/integration/random_modules.py."""

import math

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

SETTINGS = {settings!r}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, {arguments}):
{body}


def hidden(labels, mask, ignored, classes, empty=False):
    """Have labels under a mask not count. The last of a row always does, unless nothing of the microbatch does."""
    last = labels[..., -1]
    labels[..., -1] = torch.where(last == ignored, (ignored + 1) % classes, last)
    mask[..., -1] = False
    return labels.masked_fill(mask | empty, ignored)


def microbatch(g, index):
    """Return microbatch `index` of a step; g gives its random numbers."""
    made = {{}}
{made}
    return made


def counted(batch):
    """Return what a microbatch counts for in the step's mean; None: the losses of microbatches are added."""
    return {counted}
{loss}'''


def draw_case(seed: int, *, blocks: int | None = None) -> Case:
    """Draw a case; `blocks`: how many blocks it has between its inputs and its head."""
    # Here, because the three files know the Writer.
    from random_blocks import add_blocks, add_inputs
    from random_losses import add_loss

    draw = random.Random(seed)
    writer = Writer(draw)
    add_inputs(writer)
    add_blocks(writer, blocks if blocks is not None else draw.choice((3, 3, 4, 4, 5, 6, 7, 8, 10)))
    made = add_loss(writer)
    settings = _settings(writer)

    def indented(lines: list[str], by: int) -> str:
        return "\n".join(" " * by + line for line in lines)

    source = _HEADER.format(
        seed=seed,
        settings=settings,
        init=indented(writer.init, 8),
        arguments=", ".join(made.arguments),
        body=indented([*writer.body, *made.returns], 8),
        made=indented([f'made["{name}"] = {how}' for name, how in writer.inputs.items()], 4),
        counted=made.counted,
        loss=f"\n\n{made.function}\n" if made.function else "",
    )
    return Case(seed, source, settings, tuple(dict.fromkeys(writer.features)))


def _settings(writer: Writer) -> dict[str, Any]:
    draw = writer.draw
    kind = draw.choice(("sgd", "momentum", "decay", "adamw", "adamw"))
    optimizers: dict[str, tuple[dict[str, Any], float]] = {
        "sgd": ({"kind": "sgd"}, 0.05),
        "momentum": ({"kind": "sgd", "momentum": 0.9}, 0.02),
        "decay": ({"kind": "sgd", "momentum": draw.choice((0.0, 0.5)), "weight_decay": 0.05}, 0.05),
        "adamw": (
            {"kind": "adamw", "weight_decay": draw.choice((0.0, 0.1)), "epsilon": draw.choice((1e-8, 1e-6, 1e-4))},
            3e-3,
        ),
    }
    optimizer, rate = optimizers[kind]
    heldout = draw.choice((0, 1, 2))
    return {
        "steps": draw.choice((2, 2, 3, 4)),
        "microbatches": draw.choice((1, 2, 2, 2, 3, 3, 4)),
        "optimizer": optimizer,
        "learning_rate": rate,
        "gradient_clip": draw.choice((0.0, 0.0, 0.3)),
        "privacy": draw.choice(("open", "private")),
        "heldout": heldout,
        "evaluate_every": draw.choice((0, 1)) if heldout else 0,
        "roles": dict(writer.roles),
        "coupled": writer.coupled,
        "cut": draw.random(),
    }
