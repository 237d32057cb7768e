"""Repeated layers: of a long list of equal layers only the first few are traced, and the rest are instantiated.

The traced prefix holds each class of layer at least twice after the first layer. If the two are exact renamings of
each other, every further layer of that class is one more renaming. A list that does not fit is traced whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from fusionai.graph.capture.layer_classes import Layers, layer_classes
from fusionai.graph.capture.listing import Listing, node_reads, rewrite_values
from fusionai.graph.capture.state import ModuleState, value_name
from fusionai.graph.model import Argument, Atom, Node, Ref, TensorType, ValueName, WeightKey

FEWEST_LAYERS = 5
"""Shorter lists are traced whole, because instantiating would save no time."""

_WEIGHT = value_name(WeightKey(""))


class NotRepeatedError(Exception):
    """A list of layers is less regular than it seemed. The remedy is to trace it whole."""


@dataclass(frozen=True)
class RepeatedLayers:
    """A list of layers whose first few stand for all."""

    path: str
    holder: nn.Module
    layers: Layers
    classes: tuple[int, ...]
    """Class of each layer, by number."""
    traced: int
    """Layers in the prefix."""

    @property
    def attribute(self) -> str:
        """Name of the list in its holder."""
        return self.path.rpartition(".")[2]


def repeated_layers(module: nn.Module, run: Callable[[], object], state: ModuleState) -> tuple[RepeatedLayers, ...]:
    """Find the lists of layers worth shortening; `run` calls the module on example inputs."""
    lists: dict[str, Layers] = {}
    for path, each in module.named_modules():
        outer = any(path.startswith(f"{other}.") for other in lists)
        if path and not outer and type(each) in (nn.ModuleList, nn.Sequential):
            assert isinstance(each, (nn.ModuleList, nn.Sequential))
            if len(each) >= FEWEST_LAYERS:
                lists[path] = each
    if not lists:
        return ()
    with _copied_buffers(module):
        classified = layer_classes(lists, run, state)
    found = []
    for path, keys in classified.items():
        numbers: dict[Hashable, int] = {}
        classes = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
        traced = _prefix(classes)
        if traced is not None:
            holder = module.get_submodule(path.rpartition(".")[0])
            found.append(RepeatedLayers(path, holder, lists[path], classes, traced))
    return tuple(found)


@contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    """Let a module write to copies of its buffers: a run on fake tensors changes real ones that hold one number."""
    held = [(each, dict(each._buffers)) for each in module.modules()]
    copies: dict[int, Tensor] = {}
    try:
        for each, buffers in held:
            for name, tensor in buffers.items():
                if tensor is not None:
                    each._buffers[name] = copies.setdefault(id(tensor), tensor.detach().clone())
        yield
    finally:
        for each, buffers in held:
            each._buffers.clear()
            each._buffers.update(buffers)


def _prefix(classes: Sequence[int]) -> int | None:
    """Return the fewest layers that show every later class twice, the first layer not counted."""
    seen: Counter[int] = Counter()
    for length in range(1, len(classes) - 1):
        if all(seen[each] >= 2 for each in set(classes[length:])):
            return length
        seen[classes[length]] += 1
    return None


@contextmanager
def shortened(repeats: Sequence[RepeatedLayers]) -> Iterator[None]:
    """Shorten each list to its prefix. Afterwards the lists are as they were."""
    with ExitStack() as restore:
        for each in repeats:
            prefix = list(each.layers)[: each.traced]
            short = nn.ModuleList(prefix) if isinstance(each.layers, nn.ModuleList) else nn.Sequential(*prefix)
            short.training = each.layers.training
            restore.callback(each.holder._modules.__setitem__, each.attribute, each.layers)
            each.holder._modules[each.attribute] = short
        yield


def instantiate(listing: Listing, repeats: Sequence[RepeatedLayers], state: ModuleState) -> None:
    """Complete the listing of a shortened module, in place, so that it becomes the listing of the whole module.

    Raises NotRepeatedError, and leaves the listing in no particular state, when the layers of a class are not
    renamings of each other.
    """
    for each in repeats:
        _Instantiation(listing, each, state).run()


class _Instantiation:
    def __init__(self, listing: Listing, repeats: RepeatedLayers, state: ModuleState) -> None:
        self._listing, self._repeats, self._state = listing, repeats, state
        self._blocks: list[list[Node]] = [[] for _ in range(repeats.traced)]
        self._before: list[Node] = []
        self._after: list[Node] = []
        self._home: dict[ValueName, int] = {}
        """By value: the number of the layer that makes it; -1 before the layers, `traced` after them."""
        self._split()
        self._slots = [self._used_outside(number) for number in range(repeats.traced)]

    def run(self) -> None:
        repeats, listing = self._repeats, self._listing
        models: dict[int, int] = {}
        forms: dict[int, Hashable] = {}
        for number in range(1, repeats.traced):
            form = self._form(number)
            kind = repeats.classes[number]
            if forms.setdefault(kind, form) != form:
                raise NotRepeatedError(f"layers {models[kind]} and {number} of {repeats.path} differ")
            models.setdefault(kind, number)
        made: list[Node] = []
        previous = self._slots[-1]
        for number in range(repeats.traced, len(repeats.layers)):
            nodes, previous = self._copy(models[repeats.classes[number]], number, previous)
            made += nodes
        last = dict(zip(self._slots[-1], previous, strict=True))
        after = [rewrite_values(node, lambda name: last.get(name, name)) for node in self._after]
        listing.loss = last.get(listing.loss, listing.loss)
        listing.nodes = [*self._before, *(node for block in self._blocks for node in block), *made, *after]

    def _split(self) -> None:
        """Divide the operators into three runs: before, in and after the layers."""
        place = -1
        for node in self._listing.nodes:
            number = self._number(node)
            at = (place if place < 0 else self._repeats.traced) if number is None else number
            if at < place or (number is not None and at >= self._repeats.traced):
                raise NotRepeatedError(f"operators of {self._repeats.path} are not in the order of its layers")
            place = at
            for output in node.outputs:
                self._home[output] = place
            if place < 0:
                self._before.append(node)
            elif place < self._repeats.traced:
                self._blocks[place].append(node)
            else:
                self._after.append(node)
        if not all(self._blocks):
            raise NotRepeatedError(f"a layer of {self._repeats.path} has no operators")

    def _number(self, node: Node) -> int | None:
        prefix = f"{self._repeats.path}."
        if not node.scope.startswith(prefix):
            return None
        first = node.scope[len(prefix) :].split(".")[0]
        return int(first) if first.isdigit() else None

    def _used_outside(self, number: int) -> tuple[ValueName, ...]:
        """Return the values that a layer passes on, in order; only the next layer may take them."""
        used: set[ValueName] = set()
        for block, nodes in (*enumerate(self._blocks), (self._repeats.traced, self._after)):
            for node in nodes:
                for name in node_reads(node):
                    if self._home.get(name) == number and block != number:
                        if block != number + 1:
                            raise NotRepeatedError(
                                f"what layer {number} of {self._repeats.path} makes is used beyond the next one"
                            )
                        used.add(name)
        if self._home.get(self._listing.loss) == number:
            used.add(self._listing.loss)
        return tuple(output for node in self._blocks[number] for output in node.outputs if output in used)

    def _form(self, number: int) -> Hashable:
        """Return a layer's operators with every name put relative to the layer."""
        own = {
            output: (place, index)
            for place, node in enumerate(self._blocks[number])
            for index, output in enumerate(node.outputs)
        }
        previous = {name: slot for slot, name in enumerate(self._slots[number - 1])}
        prefix = f"{self._repeats.path}.{number}."

        def atom(value: Atom) -> Hashable:
            if not isinstance(value, Ref):
                return (type(value), value)
            if value.name in own:
                return ("own", own[value.name])
            if value.name in previous:
                return ("previous", previous[value.name], self._type(value.name))
            if value.name.startswith(_WEIGHT + prefix):
                return ("weight", value.name[len(_WEIGHT + prefix) :])
            return ("shared", value.name)

        def argument(value: Argument) -> Hashable:
            return tuple(atom(each) for each in value) if isinstance(value, tuple) else atom(value)

        return (
            tuple(
                (
                    node.op,
                    tuple(argument(each) for each in node.args),
                    tuple((key, argument(each)) for key, each in node.kwargs.items()),
                    tuple(self._type(output) for output in node.outputs),
                    f"{node.scope}."[len(prefix) :],
                )
                for node in self._blocks[number]
            ),
            tuple(own[name] for name in self._slots[number]),
        )

    def _type(self, name: ValueName) -> TensorType:
        return self._listing.types[name]

    def _copy(
        self, model: int, number: int, previous: tuple[ValueName, ...]
    ) -> tuple[list[Node], tuple[ValueName, ...]]:
        """Instantiate layer `number` after `model`. It takes the values that the layer before it passes on."""
        prefix, own_prefix = (f"{self._repeats.path}.{each}" for each in (model, number))
        names: dict[ValueName, ValueName] = {
            output: ValueName(f"{output}@{own_prefix}") for node in self._blocks[model] for output in node.outputs
        }
        taken = self._slots[model - 1]
        if [self._type(name) for name in taken] != [self._type(name) for name in previous]:
            raise NotRepeatedError(f"layers of {self._repeats.path} pass on values of different types")
        names.update(zip(taken, previous, strict=True))
        for name in {name for node in self._blocks[model] for name in node_reads(node)}:
            if name.startswith(f"{_WEIGHT}{prefix}."):
                key = self._state.canonical[own_prefix + name.removeprefix(_WEIGHT + prefix)]
                names[name] = value_name(key)
                self._listing.types[names[name]] = self._type(name)
                if name.removeprefix(_WEIGHT) in self._listing.mutated:
                    self._listing.mutated.add(key)
        nodes = []
        for node in self._blocks[model]:
            moved = rewrite_values(node, lambda name: names.get(name, name))
            outputs = tuple(names[output] for output in node.outputs)
            scope = own_prefix + node.scope.removeprefix(prefix)
            nodes.append(Node(outputs[0], node.op, moved.args, moved.kwargs, outputs, scope))
            self._listing.types.update((names[output], self._type(output)) for output in node.outputs)
        return nodes, tuple(names[name] for name in self._slots[model])
