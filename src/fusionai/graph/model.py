"""The OP-DAG: a model's training procedure as plain, typed, framework-free data.

An `OpDag` is a list of operator calls in execution order. Every value (operator output, input or weight) has
one name and one `TensorType`; the type's sizes may be expressions over the graph's symbols ("s0", "s0*s1"),
so that one OP-DAG serves every batch size and sequence length. A size is never a value of the graph: where an
operator takes an integer computed from shapes, its argument is a `Size` expression. An operator with several
outputs names each of them, so no cut can part an operator from its outputs.

A `SubDag` is the share of one pipeline stage: its operators, the weights it holds, and the boundary tensors
it receives and sends. Terms: FusionAI (arXiv 2309.01172) section on OP-DAGs.
"""

from __future__ import annotations

from typing import Literal, NewType

import msgspec

from fusionai.tensor import DType

ValueName = NewType("ValueName", str)
"""Name of a value: an input, a weight as seen by the graph, or an operator's output. Unique in a graph."""

WeightKey = NewType("WeightKey", str)
"""A weight's name in the model's state dict ("model.layers.0.mlp.up_proj.weight"). Tied weights share a key."""

Dim = int | str
"""A size: a number, or an expression over the graph's symbols (grammar in `fusionai.graph.sizes`)."""


class TensorType(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Element type and shape of a value."""

    dtype: DType
    shape: tuple[Dim, ...]


class Ref(msgspec.Struct, frozen=True, tag="ref", tag_field="is", forbid_unknown_fields=True):
    """An argument: the value of that name."""

    name: ValueName


class Size(msgspec.Struct, frozen=True, tag="size", tag_field="is", forbid_unknown_fields=True):
    """An argument: an integer computed from the graph's symbols."""

    expression: str


class Keyword(msgspec.Struct, frozen=True, tag="keyword", tag_field="is", forbid_unknown_fields=True):
    """An argument that is one of a closed set of words, such as a dtype or a memory format."""

    kind: Literal["dtype", "memory_format", "layout", "device", "float"]
    word: str
    """`dtype`: a name of `fusionai.tensor.DType`; `device`: always "local"; `float`: "inf", "-inf" or "nan"."""


Atom = bool | int | float | str | Ref | Size | Keyword | None
Argument = Atom | tuple[Atom, ...]
"""An argument of an operator. It is never nested deeper than one tuple."""


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operator call."""

    name: str
    """Unique in the graph; equal to the first output's name."""
    op: str
    """Operator of the vocabulary, such as "aten.linear.default" or "fusion.attention"."""
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]
    outputs: tuple[ValueName, ...]
    scope: str = ""
    """Module path that the call came from ("model.layers.3.mlp"); for people and reports only."""


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value that the job's driver supplies for every microbatch."""

    name: ValueName
    type: TensorType
    role: Literal["tokens", "labels", "positions", "data"]
    """`positions` can be derived: every row is 0..T-1, so each stage makes its own, and positions never travel."""
    private: bool
    """True for raw inputs and labels: in a private job no operator that reads them leaves the owner."""


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of the model's state. Two weights with one key are the same tensor (tied)."""

    name: ValueName
    key: WeightKey
    type: TensorType
    kind: Literal["parameter", "buffer", "constant"]
    """A `buffer` may change during training (batch-norm statistics); a `constant` never does and is not in
    the state dict of the model."""
    trainable: bool
    aliases: tuple[WeightKey, ...] = ()
    """Further state-dict names of the same tensor; a checkpoint need not repeat them."""


class EvaluationGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model computes in evaluation mode, if it differs from training by more than inference mode.

    Inputs, symbols and the weights that training reads are those of the OP-DAG. It runs as it stands.
    """

    weights: tuple[Weight, ...]
    """Weights that only evaluation reads; nothing trains them."""
    nodes: tuple[Node, ...]
    """Each node comes after the nodes that make its arguments."""
    places: tuple[int, ...]
    """For each node the place of a node of training: both run in one stage, wherever the graph is cut. Never falls."""
    types: dict[ValueName, TensorType]
    loss: ValueName


class OpDag(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole training procedure: inputs and weights to a scalar loss."""

    vocabulary: int
    """Version of the operator vocabulary that the operators are from."""
    name: str
    symbols: dict[str, tuple[ValueName, int]]
    """Each symbol with the input and axis that define it, e.g. {"s0": ("input_ids", 0)}."""
    inputs: tuple[Input, ...]
    weights: tuple[Weight, ...]
    nodes: tuple[Node, ...]
    """Each node comes after the nodes that make its arguments."""
    types: dict[ValueName, TensorType]
    """Type of every operator output (inputs and weights carry their own)."""
    loss: ValueName
    """The scalar that training minimises."""
    evaluation: EvaluationGraph | None = None
    """How evaluation computes the loss. None: by the operators of training in inference mode, without dropout."""


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A boundary tensor: made in stage `source`, used in stage `target`; its gradient goes the other way."""

    value: ValueName
    source: int
    target: int
    type: TensorType
    gradient: bool
    """Whether the loss depends differentiably on a trainable weight through this value, so that a gradient
    of the same type travels back."""


class StageEvaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stage computes in evaluation, if the OP-DAG has an evaluation graph; it may be nothing.

    The fields are those of a `SubDag`, which has the weights of both.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    types: dict[ValueName, TensorType]
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]
    loss: ValueName | None


class SubDag(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The share of one pipeline stage."""

    index: int
    symbols: dict[str, tuple[ValueName, int]]
    inputs: tuple[Input, ...]
    """Graph inputs that this stage reads (the driver, or for positions the stage itself, supplies them)."""
    weights: tuple[Weight, ...]
    nodes: tuple[Node, ...]
    """The stage's own operators, and operators that it computes again instead of receiving their outputs, in execution
    order."""
    types: dict[ValueName, TensorType]
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]
    loss: ValueName | None
    """The loss, in the stage that computes it."""
    evaluation: StageEvaluation | None = None
    """What evaluation runs here. None: the operators above in inference mode."""


Sizes = dict[str, int]
"""Numbers for the symbols of a graph, such as {"s0": 8, "s1": 256}."""
