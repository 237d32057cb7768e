"""Trains a random module twice, in a plain loop of torch and on the compnodes of a pool, and compares.

What a step is, is written here a second time, from docs/guarantees.md and without the package's code: the mean over
what counts in all microbatches, or their sum where the loss is one; gradients added up over the microbatches; torch's
own optimizer; state written in forward microbatch by microbatch; held-out loss in evaluation mode.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_modules import Loaded, draw_case, load
from torch import Tensor, nn

import fusionai
from fusionai.errors import GraphError, PlacementError, UserError
from fusionai.graph.cuts import Cutter
from fusionai.graph.model import OpDag
from fusionai.graph.privacy import arrange_private
from fusionai.owner.training_job import Observer, StepEvent

TOLERANCE = 1e-5
"""Largest relative difference of a loss, and of a tensor by its norm."""

_LEAST_LOSS, _LEAST_ELEMENT = 1e-2, 1e-2
"""Smaller losses, and tensors of smaller elements, are compared as if they were so large: of a number that is zero but
for rounding, no digit is right."""

_NOISE = 4.0
"""A difference this many times that between the plain loop in single and in double precision is rounding too."""


@dataclass
class Training:
    """What a training gave."""

    losses: list[float] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a case went."""

    seed: int
    outcome: str
    """"equal", "refused" (with an error for users), "differs", "failed" (with any other error), or "unusable": the
    plain loop cannot train it."""
    text: str = ""
    """The error, or what differs."""
    deviation: float = 0.0
    """The largest one, relative."""
    rounding: bool = False
    """Whether it is above the tolerance, but not above what rounding does to the plain loop."""
    features: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    nodes: int = 0
    cut: int = 0
    privacy: str = ""
    private_refusal: str = ""
    """Why it could not be private; it was then trained openly."""
    seconds: float = 0.0


class UnusableError(Exception):
    """The plain loop cannot train a case, so there is nothing to compare with."""


# --- plain torch ------------------------------------------------------------------------------------------------------


def train_plainly(case: Loaded, *, double: bool = False) -> Training:
    """Train in this process. Raises UnusableError where the module fails, or a loss is not finite."""
    settings, made = case.case.settings, Training()
    module = case.make()
    if double:
        module.double()
    optimizer = _optimizer(module, settings)
    try:
        if not (settings["coupled"] or double):
            _check_counts(case, case.make())
        for step in range(settings["steps"]):
            parts = [case.batch(step, index) for index in range(settings["microbatches"])]
            optimizer.zero_grad()
            made.losses.append(_passes(case, module, parts, double=double, backward=True))
            if settings["gradient_clip"]:
                nn.utils.clip_grad_norm_(module.parameters(), settings["gradient_clip"])
            optimizer.step()
            last = step + 1 == settings["steps"]
            if case.heldout and (last or settings["evaluate_every"]):
                module.eval()
                with torch.no_grad():
                    made.heldout.append(_passes(case, module, case.heldout, double=double, backward=False))
                module.train()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UnusableError(f"{type(error).__name__}: {error}") from error
    if not all(map(torch.isfinite, map(torch.tensor, made.losses + made.heldout))):
        raise UnusableError(f"losses that are not finite: {made.losses + made.heldout}")
    made.state = _state(module)
    return made


def _optimizer(module: nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    chosen = dict(settings["optimizer"])
    kind, rate = chosen.pop("kind"), settings["learning_rate"]
    trained = [each for each in module.parameters() if each.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=rate, **chosen)
    return torch.optim.AdamW(trained, lr=rate, weight_decay=chosen["weight_decay"], eps=chosen["epsilon"])


def _shares(case: Loaded, parts: list[dict[str, Tensor]]) -> list[float]:
    counts = [case.counted(part) for part in parts]
    if any(count is None for count in counts):
        return [1.0] * len(parts)
    total = sum(count or 0.0 for count in counts)
    return [(count or 0.0) / total for count in counts]


def _passes(case: Loaded, module: nn.Module, parts: list[dict[str, Tensor]], *, double: bool, backward: bool) -> float:
    total = 0.0
    for part, share in zip(parts, _shares(case, parts), strict=True):
        if share == 0:
            continue
        loss = _loss(case, module, part, double=double)
        if backward:
            (loss * share).backward()
        total += share * loss.item()
    return total


def _loss(case: Loaded, module: nn.Module, part: Mapping[str, Tensor], *, double: bool = False) -> Tensor:
    given = {name: value.double() if double and value.is_floating_point() else value for name, value in part.items()}
    roles = {"labels": "labels", **case.case.settings["roles"]}
    found: Any
    if case.loss is not None:
        labels = {name: given.pop(name) for name in list(given) if roles.get(name) == "labels"}
        found = case.loss(module(**given), labels if len(labels) > 1 else next(iter(labels.values())))
    else:
        found = module(**given)
    if isinstance(found, dict):
        found = found["loss"]
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss


def _check_counts(case: Loaded, module: nn.Module) -> None:
    """Raise AssertionError unless the first step's loss is that of its microbatches as one batch."""
    parts = [case.batch(0, index) for index in range(case.case.settings["microbatches"])]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with torch.no_grad():
        apart = _passes(case, module, parts, double=False, backward=False)
        together = float(_loss(case, module, whole))
    assert abs(apart - together) <= 1e-4 * max(1.0, abs(together)), (
        f"seed {case.case.seed}: the reference's step has the loss {apart}, its batch as a whole {together}"
    )


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


# --- a pool -----------------------------------------------------------------------------------------------------------


class _Noted(Observer):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.heldout: list[float] = []

    def stepped(self, event: StepEvent) -> None:
        self.losses.append(event.loss)
        if event.evaluation is not None:
            self.heldout.append(event.evaluation)


def train_pooled(case: Loaded, token: str, folder: Path, outcome: Outcome, privacy: str) -> Training:
    """Train on two compnodes, cut where the case says, and note the operators in the outcome."""
    settings, noted = case.case.settings, _Noted()
    module = case.make()

    def cut(graph: OpDag) -> int:
        outcome.operators = tuple(sorted({node.op for node in graph.nodes}))
        outcome.nodes = len(graph.nodes)
        outcome.cut = _cut(graph, privacy, settings["cut"])
        return outcome.cut

    outcome.privacy = privacy
    fusionai.train(
        module,
        case.batch,
        broker=token,
        loss=case.loss,
        roles=settings["roles"] or None,
        steps=settings["steps"],
        microbatches=settings["microbatches"],
        learning_rate=settings["learning_rate"],
        optimizer=fusionai.OptimizerConfig(**settings["optimizer"]),
        gradient_clip=settings["gradient_clip"],
        privacy=privacy,  # type: ignore[arg-type]
        compnodes=2,
        cuts=cut,
        heldout=case.heldout,
        evaluate_every=settings["evaluate_every"],
        run=folder / f"run-{case.case.seed}-{privacy}",
        observer=noted,
    )
    return Training(noted.losses, noted.heldout, _state(module))


def _cut(graph: OpDag, privacy: str, where: float) -> int:
    """Return a position that parts the work of the compnodes; `where`, from 0 to 1, says which of those that do."""
    front, back = 0, len(graph.nodes)
    if privacy == "private":
        graph, front, back = arrange_private(graph)
    cutter, places = Cutter(graph), list(range(front + 1, back))
    first = int(where * len(places))
    for place in [*places[first:], *places[:first]]:
        try:
            cutter.cut([each for each in (front, place, back) if 0 < each < len(graph.nodes)])
        except GraphError:
            continue
        return place
    raise GraphError(f"no position of {front} to {back} parts the work: it leaves nothing for compnodes")


# --- both -------------------------------------------------------------------------------------------------------------


def compare(seed: int, token: str, *, case: Loaded | None = None) -> Outcome:
    """Draw the module of a seed, train it twice, and say how that went."""
    torch.set_num_threads(1)
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fusionai-differential-") as name:
        folder = Path(name)
        case = case or load(draw_case(seed), folder)
        outcome = Outcome(seed, "equal", features=case.case.features)
        try:
            _compare(case, token, folder, outcome)
        except UnusableError as error:
            outcome.outcome, outcome.text = "unusable", str(error)
        except (UserError, PlacementError) as error:
            outcome.outcome, outcome.text = "refused", f"{type(error).__name__}: {error}"
        except Exception as error:
            outcome.outcome, outcome.text = "failed", f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - started_s
    return outcome


def _compare(case: Loaded, token: str, folder: Path, outcome: Outcome) -> None:
    expected = train_plainly(case)
    privacy = case.case.settings["privacy"]
    try:
        found = train_pooled(case, token, folder, outcome, privacy)
    except GraphError as error:
        if privacy == "open" or not any(words in str(error) for words in ("for compnodes", "cut privately")):
            raise
        outcome.private_refusal = str(error)
        found = train_pooled(case, token, folder, outcome, "open")
    differences = _differences(found, expected)
    outcome.deviation = max(differences.values(), default=0.0)
    if outcome.deviation > TOLERANCE:
        outcome.rounding = outcome.deviation <= _NOISE * _rounding(case, expected)
        if not outcome.rounding:
            outcome.outcome = "differs"
            outcome.text = "; ".join(_said(found, expected, differences))


def _rounding(case: Loaded, expected: Training) -> float:
    """Return how far single precision alone takes the plain loop from double precision."""
    try:
        return max(_differences(expected, train_plainly(case, double=True)).values())
    except UnusableError:
        return 0.0


def _differences(found: Training, expected: Training) -> dict[str, float]:
    """Return every relative difference by the name of what differs."""
    assert found.state.keys() == expected.state.keys()
    assert len(found.losses) == len(expected.losses)
    made: dict[str, float] = {}
    for name, ours, theirs in (("loss", found.losses, expected.losses), ("held-out", found.heldout, expected.heldout)):
        if len(ours) != len(theirs):
            made[f"{name} count"] = 1.0
        for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            made[f"{name} {place}"] = abs(one - other) / max(abs(other), _LEAST_LOSS)
    for key, tensor in expected.state.items():
        one, other = found.state[key].double(), tensor.double()
        if one.shape != other.shape:
            made[key] = 1.0
            continue
        least = _LEAST_ELEMENT * max(1, other.numel()) ** 0.5
        made[key] = float((one - other).norm()) / max(float(other.norm()), least)
    return made


def _said(found: Training, expected: Training, differences: dict[str, float]) -> list[str]:
    """Name what differs most."""
    worst = sorted(differences, key=lambda name: -differences[name])[:3]
    lines = [f"losses {found.losses} instead of {expected.losses}"] if differences["loss 0"] > TOLERANCE else []
    if expected.heldout and any(differences[each] > TOLERANCE for each in differences if each.startswith("held-out")):
        lines.append(f"held-out losses {found.heldout} instead of {expected.heldout}")
    return [*lines, *(f"{name} by {differences[name]:.1e}" for name in worst)]
