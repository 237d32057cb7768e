"""Small jobs for the fake plane: chains of multiplications with skips and shared weights, cut anywhere.

`Reference` trains the same job without any driver, host or network: one program for each machine, called in a plain
loop. A real job must give the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fake_plane import FakePlane, FakeProgram, array, data
from msgspec.structs import replace

from fusionai.execution.plane import OptimizerConfig, ProgramOptions
from fusionai.execution.program import MicrobatchKey
from fusionai.graph.cuts import cut
from fusionai.graph.evaluation import evaluated, face
from fusionai.graph.evaluation_places import placed
from fusionai.graph.model import (
    EvaluationGraph,
    Input,
    Node,
    OpDag,
    Ref,
    SubDag,
    TensorType,
    ValueName,
    Weight,
    WeightKey,
)
from fusionai.graph.vocabulary import VOCABULARY_VERSION
from fusionai.tensor import TensorData
from fusionai.training.data.batches import Batch

ROWS, WIDTH = 2, 3
OWNER = "owner"
OPTIONS = ProgramOptions(optimizer=OptimizerConfig(kind="sgd", momentum=0.5))
STATES = OPTIONS.optimizer.states


@dataclass(frozen=True)
class Layer:
    """Multiplies by a weight, and adds an earlier layer's output where `skip` names one (0: the graph's input)."""

    weight: str
    skip: int | None = None


def chain(layers: Sequence[Layer]) -> OpDag:
    """The graph of some layers and the mean squared error. Layers of equal weight names share the weight."""
    hidden, scalar = TensorType("float64", ("s0", WIDTH)), TensorType("float32", ())
    nodes: list[Node] = []
    weights: list[Weight] = []
    types: dict[ValueName, TensorType] = {}
    outputs = [ValueName("x")]

    def node(op: str, name: str, *names: ValueName) -> ValueName:
        nodes.append(Node(name, op, tuple(Ref(each) for each in names), {}, (ValueName(name),), scope=f"layers.{name}"))
        types[ValueName(name)] = hidden
        return ValueName(name)

    for number, layer in enumerate(layers):
        held = ValueName(f"w{number}")
        weights.append(Weight(held, WeightKey(layer.weight), TensorType("float64", (WIDTH,)), "parameter", True))
        out = node("aten.mul.Tensor", f"m{number}", outputs[-1], held)
        if layer.skip is not None:
            out = node("aten.add.Tensor", f"a{number}", out, outputs[layer.skip])
        outputs.append(out)
    loss = node("aten.mse_loss.default", "loss", outputs[-1], ValueName("y"))
    types[loss] = scalar
    inputs = (Input(ValueName("x"), hidden, "data", True), Input(ValueName("y"), hidden, "labels", True))
    symbols = {"s0": (ValueName("x"), 0)}
    return OpDag(VOCABULARY_VERSION, "toy", symbols, inputs, tuple(weights), tuple(nodes), types, loss)


def evaluating_by(training: OpDag, other: OpDag) -> OpDag:
    """The first graph, evaluated by the second one, which has equal names for equal weights and may have more."""
    known = {weight.name for weight in training.weights}
    further = tuple(replace(weight, trainable=False) for weight in other.weights if weight.name not in known)
    own = EvaluationGraph(further, other.nodes, (0,) * len(other.nodes), other.types, other.loss)
    return replace(training, evaluation=placed(training, own))


@dataclass(frozen=True)
class Pipeline:
    """A graph, where it is cut, and who holds which stage."""

    graph: OpDag
    cuts: tuple[int, ...]
    holders: tuple[str, ...]
    """Name of each stage's machine; `OWNER` may be one."""
    in_flight: Mapping[int, int] = field(default_factory=dict)
    """By stage; 2 where nothing is said."""

    @cached_property
    def subdags(self) -> tuple[SubDag, ...]:
        return cut(self.graph, self.cuts)

    @property
    def machines(self) -> tuple[str, ...]:
        """Machines with stages, in the order of the pipeline."""
        return tuple(dict.fromkeys(self.holders))

    def of(self, machine: str) -> tuple[SubDag, ...]:
        """The stages of a machine."""
        return tuple(subdag for subdag in self.subdags if self.holders[subdag.index] == machine)

    def tied(self) -> dict[WeightKey, tuple[str, ...]]:
        """Weights that several machines hold, with these machines, the one with the first stage first."""
        found: dict[WeightKey, dict[str, None]] = {}
        for subdag in self.subdags:
            for weight in subdag.weights:
                found.setdefault(weight.key, {})[self.holders[subdag.index]] = None
        return {key: tuple(each) for key, each in found.items() if len(each) > 1}


def three_machines() -> Pipeline:
    """Stages on a, b and c; a and c share a weight; a value of a skips b; the owner holds none."""
    layers = [Layer("embedding"), Layer("middle"), Layer("embedding", skip=1)]
    return Pipeline(chain(layers), (1, 2), ("a", "b", "c"))


def noise(name: str, rows: int | None = None) -> TensorData:
    """Numbers that depend on the name only."""
    draw = random.Random(name)
    count = WIDTH * (1 if rows is None else rows)
    shape = (WIDTH,) if rows is None else (rows, WIDTH)
    return TensorData("float64", shape, data([draw.uniform(0.5, 1.5) for _ in range(count)]).data)


class Start:
    """The weights that training starts from."""

    def read(self, name: str) -> TensorData:
        return noise(name)


def batch(step: int, microbatches: int, rows: int = ROWS) -> list[dict[str, TensorData]]:
    """The microbatches of a step."""
    return [{"x": noise(f"x{step}/{i}", rows), "y": noise(f"y{step}/{i}", rows)} for i in range(microbatches)]


class Reference:
    """A job that is trained without driver, hosts and network."""

    def __init__(self, pipeline: Pipeline, *, gradient_clip: float = 1.0) -> None:
        self.pipeline = pipeline
        self.plane = FakePlane()
        self._clip = gradient_clip
        self.programs: dict[str, FakeProgram] = {}
        for machine in pipeline.machines:
            program = self.programs[machine] = self.plane.load(pipeline.of(machine), OPTIONS)
            for key in program.keys():  # noqa: SIM118 (a method of programs)
                program.load(key, noise(key))
        self.steps = 0

    def _passes(self, step: int, microbatches: Sequence[Batch], weights: Sequence[float], *, train: bool) -> float:
        stages, holders = self.pipeline.subdags, self.pipeline.holders
        sizes = {"s0": microbatches[0]["x"].shape[0]}
        loss = 0.0
        for index, microbatch in enumerate(microbatches):
            values = {ValueName(name): tensor for name, tensor in microbatch.items()}
            key = MicrobatchKey(step, index)
            for stage in (face(each, train) for each in stages):
                names = [item.name for item in stage.inputs] + [each.value for each in stage.receives]
                given = {name: values[name] for name in names}
                values |= self.programs[holders[stage.index]].forward(stage.index, key, sizes, given, train=train)
            graph = self.pipeline.graph if train else evaluated(self.pipeline.graph)
            loss += weights[index] * float(array(values[graph.loss]))
            gradients: dict[tuple[ValueName, int], TensorData] = {}
            for stage in reversed(stages) if train else ():
                taken: dict[ValueName, list[TensorData]] = {}
                for each in sorted(stage.sends, key=lambda each: -each.target):
                    if each.gradient:
                        taken.setdefault(each.value, []).append(gradients[each.value, each.target])
                found = self.programs[holders[stage.index]].backward(stage.index, key, taken, weights[index])
                gradients |= {(name, stage.index): tensor for name, tensor in found.items()}
        return loss

    def train_step(self, microbatches: Sequence[Batch], weights: Sequence[float], rate: float) -> float:
        """Run a step; return its loss."""
        loss = self._passes(self.steps, microbatches, weights, train=True)
        for key, holders in self.pipeline.tied().items():
            parts = [self.programs[holder].read_gradient(key) for holder in reversed(holders)]
            for holder in holders:
                self.programs[holder].set_gradient(key, parts)
        norms: dict[WeightKey, float] = {}
        for program in self.programs.values():
            norms = program.gradient_norms() | norms
        order = list(dict.fromkeys(weight.key for weight in self.pipeline.graph.weights))
        clipping = self.plane.clipping([norms[key] for key in order], self._clip)
        for program in self.programs.values():
            program.update(rate, clipping.factor)
        self.steps += 1
        return loss

    def evaluate(self, microbatches: Sequence[Batch], weights: Sequence[float]) -> float:
        """Return a loss; changes nothing."""
        return self._passes(0, microbatches, weights, train=False)

    def tensors(self) -> dict[tuple[str, str | None], bytes]:
        """Every weight and its state."""
        return {
            (key, state): bytes(program.read(key, state).data)
            for program in self.programs.values()
            for key in program.keys()  # noqa: SIM118 (a method of programs)
            for state in (None, *STATES)
        }
