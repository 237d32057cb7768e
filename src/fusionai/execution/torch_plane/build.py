"""Builds a torch function from a sub-DAG for one set of sizes.

Sizes become numbers. Values that depend only on sizes, positions and constants (rotary tables, masks) are computed once
here and shared by all microbatches. They are computed without autocast, because bf16 cannot tell neighbouring positions
above 256 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from fusionai.errors import GraphError
from fusionai.execution.torch_plane.attention import needs_mask, window_mask
from fusionai.execution.torch_plane.operators import (
    ATTENTION,
    shape_callable,
    torch_callable,
)
from fusionai.execution.torch_plane.tensors import TORCH_DTYPES
from fusionai.graph.evaluation import faces
from fusionai.graph.inference import draws, in_inference, written_values
from fusionai.graph.model import Argument, Keyword, Node, Ref, Size, Sizes, SubDag, TensorType, ValueName, WeightKey
from fusionai.graph.sizes import concrete, evaluate
from fusionai.graph.vocabulary import operator
from fusionai.tensor import DType

_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True, slots=True)
class Feed:
    """A tensor that comes with each microbatch."""

    name: ValueName
    dtype: DType
    shape: tuple[int, ...]
    received: bool
    """Whether it comes from another stage. Otherwise the job's driver sends it."""
    gradient: bool


@dataclass(frozen=True, slots=True)
class StageFunction:
    """A stage at one set of sizes.

    `module.forward` takes the feeds, then the weights, then the fixed values, and returns the outputs.
    """

    module: fx.GraphModule
    feeds: tuple[Feed, ...]
    weights: tuple[WeightKey, ...]
    fixed: tuple[Tensor, ...]
    outputs: tuple[ValueName, ...]
    random: bool
    mutated: frozenset[WeightKey]
    """Buffers that the call writes to."""


def mutated_keys(subdag: SubDag) -> frozenset[WeightKey]:
    """Return the keys of the buffers that a stage writes to, in training or in evaluation.

    Raises GraphError when an operator writes to anything else: a kept activation must not change.
    """
    buffers = {weight.name: weight.key for weight in subdag.weights if not weight.trainable}
    found = set()
    for node in (node for part in faces(subdag) for node in part.nodes):
        for value in written_values(node):
            if value not in buffers:
                raise GraphError(f"operator {node.op!r} at {node.name!r} writes to {value!r}, which is no buffer")
            found.add(buffers[value])
    return frozenset(found)


def specialise(
    subdag: SubDag,
    sizes: Sizes,
    weights: Mapping[WeightKey, Tensor],
    *,
    mutable: frozenset[WeightKey],
    train: bool,
    device: torch.device,
    deferred: frozenset[str] = frozenset(),
    linear: Callable[..., Tensor] | None = None,
) -> StageFunction:
    """Build a stage for `sizes`.

    `train`: the operators as they stand; otherwise in inference mode. `mutable` are the buffers that some stage of the
    program writes to. `linear` stands in for `aten.linear` at the
    nodes named in `deferred`. Raises GraphError for an operator that
    is not in the vocabulary, a missing size, a reference to a value that the stage does not have, or an operator that
    does not give what the sub-DAG says it does.
    """
    # The sub-DAG may come from a peer, and the planner reckoned its memory from the types that it declares.
    _Builder(subdag, sizes, {}, mutable, train, torch.device("meta")).check_types()
    replaced = dict.fromkeys(deferred, linear) if linear is not None else {}
    return _Builder(subdag, sizes, weights, mutable, train, device, replaced).build()


class _Builder:
    """The state of building one stage function."""

    def __init__(
        self,
        subdag: SubDag,
        sizes: Sizes,
        weights: Mapping[WeightKey, Tensor],
        mutable: frozenset[WeightKey],
        train: bool,
        device: torch.device,
        replaced: Mapping[str, Callable[..., Tensor]] | None = None,
    ) -> None:
        self._subdag = subdag
        self._sizes = sizes
        self._weights = weights
        self._mutable = mutable
        self._device = device
        self._replaced = replaced or {}
        nodes = (node if train else in_inference(node) for node in subdag.nodes)
        self._nodes = [node for node in nodes if node is not None]
        self._types = _types(subdag)
        self._fixed: dict[ValueName, Tensor] = {}
        self._masks: dict[tuple[int, int, bool], ValueName] = {}

    def build(self) -> StageFunction:
        remaining = self._compute_fixed()
        graph = fx.Graph()
        names: dict[ValueName, fx.Node] = {}

        def placeholder(value: ValueName) -> None:
            # Names of a peer's graph never reach generated code.
            names[value] = graph.placeholder(f"v{len(names)}")

        feeds = tuple(self._feeds())
        for feed in feeds:
            placeholder(feed.name)
        keys: dict[WeightKey, fx.Node] = {}
        used = {value for node in remaining for value in _references(node)}
        outputs = _outputs(self._subdag)
        for weight in self._subdag.weights:
            if weight.name not in used and weight.name not in outputs:
                continue
            if weight.key not in keys:
                placeholder(weight.name)
                keys[weight.key] = names[weight.name]
            names[weight.name] = keys[weight.key]
        masks = set(self._masks.values())
        fixed = [value for value in self._fixed if value in used or value in outputs or value in masks]
        for value in fixed:
            placeholder(value)
        mutated: set[ValueName] = set()
        for node in remaining:
            self._emit(graph, node, names)
            mutated |= written_values(node)
        graph.output(tuple(self._value(names, output, "the stage's outputs") for output in outputs))
        return StageFunction(
            module=fx.GraphModule(torch.nn.Module(), graph),
            feeds=feeds,
            weights=tuple(keys),
            fixed=tuple(self._fixed[value] for value in fixed),
            outputs=outputs,
            random=any(draws(node) for node in remaining),
            mutated=frozenset(weight.key for weight in self._subdag.weights if weight.name in mutated),
        )

    def check_types(self) -> None:
        """Run every call on tensors without memory. Raises GraphError where a result is not of the declared type."""
        made = {output for node in self._subdag.nodes for output in node.outputs}
        values = {name: self._empty(type) for name, type in self._types.items() if name not in made}
        with torch.no_grad():
            for node in self._nodes:
                declared = [self._empty(self._types[output]) for output in node.outputs]
                kwargs = self._kwargs(node, values)
                if "device" in operator(node.op).by_name and node.op != "aten.to.device":
                    kwargs["device"] = self._device  # otherwise a tensor made from numbers would take memory
                try:
                    result = shape_callable(node.op)(*self._args(node, values), **kwargs)
                except GraphError:
                    raise
                except Exception as error:  # torch raises many kinds for bad arguments
                    text = str(error).partition("\n")[0][:300]
                    raise GraphError(f"operator {node.op!r} at {node.name[:80]!r} cannot run: {text}") from error
                results = list(result) if isinstance(result, list | tuple) else [result]
                found = [(each.dtype, each.shape) for each in results]
                if found != [(each.dtype, each.shape) for each in declared]:
                    raise GraphError(
                        f"operator {node.op!r} at {node.name[:80]!r} gives {_listed(results)}, "
                        f"but the OP-DAG says {_listed(declared)}"
                    )
                values.update(zip(node.outputs, results, strict=True))

    def _empty(self, type: TensorType) -> Tensor:
        return torch.empty(concrete(type, self._sizes), dtype=TORCH_DTYPES[type.dtype], device=self._device)

    def _feeds(self) -> Iterator[Feed]:
        for item in self._subdag.inputs:
            if item.role != "positions":
                yield Feed(item.name, item.type.dtype, concrete(item.type, self._sizes), False, False)
        for transfer in self._subdag.receives:
            shape = concrete(transfer.type, self._sizes)
            yield Feed(transfer.value, transfer.type.dtype, shape, True, transfer.gradient)

    def _compute_fixed(self) -> list[Node]:
        """Compute the values that are equal for all microbatches. Return the calls that remain."""
        for item in self._subdag.inputs:
            if item.role == "positions":
                shape = concrete(item.type, self._sizes)
                row = torch.arange(shape[-1], dtype=TORCH_DTYPES[item.type.dtype], device=self._device)
                self._fixed[item.name] = row.expand(shape).contiguous()
        for weight in self._subdag.weights:
            if weight.kind != "parameter" and weight.key not in self._mutable:
                self._fixed[weight.name] = self._weights[weight.key]
        given = set(self._fixed)
        remaining = []
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            for node in self._nodes:
                depends = set(_references(node))
                operator(node.op).bind(node)  # refuses arguments that do not fit the schema
                if depends <= self._fixed.keys() and not draws(node) and not written_values(node):
                    self._run(node)
                else:
                    self._add_mask(node)
                    remaining.append(node)
        # Constants and buffers that calls read directly are passed as weights.
        for weight in self._subdag.weights:
            if weight.name in given:
                del self._fixed[weight.name]
        return remaining

    def _run(self, node: Node) -> None:
        result = torch_callable(node.op)(*self._args(node, self._fixed), **self._kwargs(node, self._fixed))
        results = result if isinstance(result, list | tuple) else (result,)
        self._fixed.update(zip(node.outputs, results, strict=True))

    def _emit(self, graph: fx.Graph, node: Node, names: dict[ValueName, fx.Node]) -> None:
        args, kwargs = self._args(node, names), self._kwargs(node, names)
        mask = self._mask(node)
        if mask is not None:
            kwargs["mask_TT"] = names[self._masks[mask]]
        function = self._replaced.get(node.name) or torch_callable(node.op)
        made = graph.create_node("call_function", function, args, kwargs, name=f"v{len(names)}")
        if operator(node.op).outputs == 1:
            names[node.outputs[0]] = made
            return
        for position, output in enumerate(node.outputs):
            names[output] = graph.call_function(getitem, (made, position))

    def _mask(self, node: Node) -> tuple[int, int, bool] | None:
        """Return (tokens, window, causal) of the mask that an attention call needs."""
        if node.op != ATTENTION:
            return None
        bound = operator(ATTENTION).bind(node)
        query, window, softcap = bound["query"], bound["window"], bound["softcap"]
        if not isinstance(query, Ref) or not isinstance(window, int) or not isinstance(softcap, int | float):
            raise GraphError(f"{ATTENTION} at {node.name!r}: window and softcap must be plain numbers")
        causal = bool(bound["causal"])
        tokens = concrete(self._types[query.name], self._sizes)[2]
        if not needs_mask(tokens, window=window, softcap=softcap, causal=causal):
            return None
        return tokens, window, causal

    def _add_mask(self, node: Node) -> None:
        mask = self._mask(node)
        if mask is not None and mask not in self._masks:
            # A space cannot occur in a captured value's name.
            name = ValueName(f"attention mask {len(self._masks)}")
            self._masks[mask] = name
            self._fixed[name] = window_mask(*mask, self._device)

    def _args(self, node: Node, values: Mapping[ValueName, Any]) -> tuple[Any, ...]:
        return tuple(self._argument(values, item, node.name) for item in node.args)

    def _kwargs(self, node: Node, values: Mapping[ValueName, Any]) -> dict[str, Any]:
        return {name: self._argument(values, item, node.name) for name, item in node.kwargs.items()}

    def _argument(self, values: Mapping[ValueName, Any], item: Argument, user: str) -> Any:
        match item:
            case Ref(name):
                return self._value(values, name, user)
            case Size(expression):
                return evaluate(expression, self._sizes)
            case Keyword():
                return self._keyword(item)
            case tuple():
                return [self._argument(values, part, user) for part in item]
            case _:
                return item

    def _keyword(self, item: Keyword) -> Any:
        try:
            match item.kind:
                case "dtype":
                    return TORCH_DTYPES[item.word]
                case "memory_format":
                    return _MEMORY_FORMATS[item.word]
                case "layout":
                    return {"strided": torch.strided}[item.word]
                case "float":
                    return {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}[item.word]
                case "device":
                    return self._device
        except KeyError as error:
            raise GraphError(f"{item.word!r} is no {item.kind} that the torch plane knows") from error

    @staticmethod
    def _value(values: Mapping[ValueName, Any], name: ValueName, user: str) -> Any:
        try:
            return values[name]
        except KeyError as error:
            raise GraphError(f"value {name!r}, used by {user}, is not made or received before it") from error


def _types(subdag: SubDag) -> dict[ValueName, TensorType]:
    """Return the type of every value that a stage can refer to."""
    return {
        **subdag.types,
        **{item.name: item.type for item in subdag.inputs},
        **{item.name: item.type for item in subdag.weights},
        **{item.value: item.type for item in subdag.receives},
    }


def _listed(tensors: Sequence[Tensor]) -> str:
    """Name the types of some tensors, the first few only."""
    shown = [f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors[:4]]
    return ", ".join(shown) + (f" and {len(tensors) - 4} more" if len(tensors) > 4 else "")


def _references(node: Node) -> Iterator[ValueName]:
    for item in (*node.args, *node.kwargs.values()):
        for part in item if isinstance(item, tuple) else (item,):
            if isinstance(part, Ref):
                yield part.name


def _outputs(subdag: SubDag) -> tuple[ValueName, ...]:
    """Return the outputs of a stage without repetitions: the values that it sends, then the loss."""
    values = [transfer.value for transfer in subdag.sends]
    if subdag.loss is not None:
        values.append(subdag.loss)
    return tuple(dict.fromkeys(values))
