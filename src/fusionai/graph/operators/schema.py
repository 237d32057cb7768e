"""Operators: their argument schemas, and the properties that cuts, costs and planes need.

Signatures are written in a small language:

    aten.linear.default(input: tensor, weight: tensor, bias: tensor? = none)
    aten.mean.dim(self: tensor, dim: ints?, keepdim: bool = false, *, dtype: dtype? = none)
    aten.topk.default(self: tensor, k: int, dim: int = -1) -> 2
    aten.unbind.int(self: tensor, dim: int = 0) -> list

Arguments after `*` are given by keyword only. Kinds are listed in `ArgumentKind`; "?" allows None. "-> N" is the number
of outputs (1 when left out), "-> list" a number that depends on the call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from fusionai.errors import GraphError
from fusionai.graph.model import Argument, Atom, Keyword, Node, Ref, Size
from fusionai.tensor import ITEM_BYTES, tensor_bytes

ArgumentKind = Literal[
    "tensor",
    "operand",
    "tensors",
    "int",
    "ints",
    "float",
    "floats",
    "number",
    "bool",
    "string",
    "dtype",
    "device",
    "layout",
    "memory_format",
]
"""`operand`: a tensor, or a number standing for a tensor without axes. `tensors`, `ints`, `floats`: tuples;
`ints` also takes one integer, meant for every axis. Integers may be `Size` expressions."""

OpClass = Literal[
    "matmul",
    "attention",
    "convolution",
    "elementwise",
    "normalisation",
    "reduction",
    "gather",
    "view",
    "metadata",
]
"""How an operator's time is estimated: the first three classes by FLOPs, the others by bytes moved; a view is free."""

FLOP_CLASSES: tuple[OpClass, ...] = ("matmul", "attention", "convolution")
"""Classes whose time is FLOPs over an achieved FLOP/s of a device profile."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a signature."""

    name: str
    kind: ArgumentKind
    optional: bool
    """None is allowed."""
    items_optional: bool
    """For `tensors`: single items may be None."""
    required: bool
    default: Argument
    keyword_only: bool


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of a call at concrete sizes."""

    dtype: str
    shape: tuple[int, ...]
    needs_gradient: bool
    """Whether backward computes a gradient for it."""

    @property
    def nbytes(self) -> int:
        """Size of the dense tensor in bytes."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.nbytes // ITEM_BYTES[self.dtype]


CallValue = Operand | bool | int | float | str | None | tuple["CallValue", ...]


@dataclass(frozen=True, slots=True)
class ConcreteCall:
    """The arguments and outputs of one operator call at concrete sizes: arguments by name, defaults filled in."""

    arguments: Mapping[str, CallValue]
    outputs: tuple[Operand, ...]

    def tensor(self, name: str) -> Operand:
        """Return a tensor argument; a number in its place counts as a tensor without axes."""
        value = self.arguments[name]
        return value if isinstance(value, Operand) else Operand("float32", (), False)

    def has(self, name: str) -> bool:
        """Return whether the argument is a tensor."""
        return isinstance(self.arguments[name], Operand)

    def tensors(self, name: str) -> tuple[Operand, ...]:
        """Return the tensors of a tuple argument, or of a single one."""
        value = self.arguments[name]
        items = value if isinstance(value, tuple) else (value,)
        return tuple(item for item in items if isinstance(item, Operand))

    def number(self, name: str) -> float:
        """Return a number argument. A missing number and a text count as 0."""
        value = self.arguments[name]
        return value if isinstance(value, (bool, int, float)) else 0

    def integers(self, name: str) -> tuple[int, ...]:
        """Return the integers of a tuple argument, or of a single one."""
        value = self.arguments[name]
        items = value if isinstance(value, tuple) else (value,)
        return tuple(item for item in items if isinstance(item, int))


FlopRule = Callable[[ConcreteCall], tuple[int, int]]
"""FLOPs (a multiply-add is two) of a call: forward, and backward for the gradients that are needed."""

ByteRule = Callable[[ConcreteCall], int]
"""Bytes of a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator of the vocabulary."""

    name: str
    parameters: tuple[Parameter, ...]
    outputs: int | Literal["list"]
    op_class: OpClass
    view: str | None = None
    """Argument whose memory the outputs share: always, or where the layout allows it (see `graph.layouts`)."""
    mutates: tuple[str, ...] = ()
    """Arguments that the operator writes to."""
    random: bool = False
    """Whether results depend on random numbers."""
    differentiable: bool = True
    """Whether gradients pass from floating-point outputs to floating-point arguments."""
    flops: FlopRule | None = None
    saves: tuple[str, ...] = ()
    """What autograd keeps for backward when any argument needs a gradient: "x" (an argument), "x if y" (only when y
    needs a gradient), "output" or "output 1"."""
    extra: ByteRule | None = None
    """Bytes that autograd keeps besides `saves`, made inside the operator (mean, mask, log-sum-exp)."""
    workspace: ByteRule | None = None
    """Bytes that forward needs only while it runs."""
    backward_workspace: ByteRule | None = None
    """Bytes that backward needs only while it runs, besides the gradients themselves."""
    by_name: Mapping[str, Parameter] = field(default_factory=dict, compare=False, repr=False)

    def bind(self, node: Node) -> dict[str, Argument]:
        """Return every argument of a call by its name, defaults filled in.

        Raises GraphError naming the node when the arguments do not fit the schema.
        """
        problems = list(self.problems(node))
        if problems:
            raise GraphError("; ".join(problems))
        positional = [parameter for parameter in self.parameters if not parameter.keyword_only]
        bound = {parameter.name: parameter.default for parameter in self.parameters}
        bound.update((parameter.name, value) for parameter, value in zip(positional, node.args, strict=False))
        bound.update(node.kwargs)
        return bound

    def problems(self, node: Node) -> Iterable[str]:
        """Yield one sentence for each thing that is wrong with the arguments of a call."""
        where = f"node {node.name!r} ({self.name})"
        positional = [parameter for parameter in self.parameters if not parameter.keyword_only]
        if len(node.args) > len(positional):
            yield f"{where}: {len(node.args)} positional arguments, at most {len(positional)} are allowed"
        given: dict[str, Argument] = {}
        for parameter, value in zip(positional, node.args, strict=False):
            given[parameter.name] = value
        for name, value in node.kwargs.items():
            if name not in self.by_name:
                yield f"{where}: unknown argument {name!r}; it takes {', '.join(self.by_name)}"
            elif name in given:
                yield f"{where}: argument {name!r} is given twice"
            given[name] = value
        for parameter in self.parameters:
            if parameter.name not in given:
                if parameter.required:
                    yield f"{where}: argument {parameter.name!r} is missing"
            elif not _fits(parameter, given[parameter.name]):
                expected = parameter.kind + ("?" if parameter.optional else "")
                yield f"{where}: argument {parameter.name!r} must be {expected}, got {_brief(given[parameter.name])}"
        if isinstance(self.outputs, int) and len(node.outputs) != self.outputs:
            yield f"{where}: {len(node.outputs)} outputs, the operator has {self.outputs}"
        elif not node.outputs:
            yield f"{where}: no outputs"


def _brief(value: Argument) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_WORDS: dict[str, frozenset[str]] = {
    "dtype": frozenset(ITEM_BYTES),
    "device": frozenset({"local"}),
    "layout": frozenset({"strided"}),
    "memory_format": frozenset({"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"}),
}
_FLOAT_WORDS = frozenset({"inf", "-inf", "nan"})


def is_word(keyword: Keyword) -> bool:
    """Return whether a keyword's word is one of its kind."""
    return keyword.word in (_FLOAT_WORDS if keyword.kind == "float" else _WORDS[keyword.kind])


def _is_int(value: Argument) -> bool:
    return isinstance(value, Size) or (isinstance(value, int) and not isinstance(value, bool))


def _is_number(value: Argument) -> bool:
    if isinstance(value, Keyword):
        return value.kind == "float" and is_word(value)
    return isinstance(value, (bool, int, float, Size))


def _is_ref(value: Argument) -> bool:
    return isinstance(value, Ref)


_SINGLE: dict[str, Callable[[Argument], bool]] = {
    "tensor": _is_ref,
    "operand": lambda value: _is_ref(value) or _is_number(value),
    "int": _is_int,
    "float": _is_number,
    "number": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
}
_SEVERAL: dict[str, Callable[[Argument], bool]] = {"tensors": _is_ref, "ints": _is_int, "floats": _is_number}


def _fits(parameter: Parameter, value: Argument) -> bool:
    if value is None:
        return parameter.optional
    single = _SINGLE.get(parameter.kind)
    if single is not None:
        return single(value)
    several = _SEVERAL.get(parameter.kind)
    if several is None:
        return isinstance(value, Keyword) and value.kind == parameter.kind and is_word(value)
    if parameter.kind == "ints" and _is_int(value):
        return True
    return isinstance(value, tuple) and all(
        several(item) or (item is None and parameter.items_optional) for item in value
    )


_SIGNATURE = re.compile(r"([\w.]+)\((.*)\)(?:\s*->\s*(\d+|list))?")
_KINDS: frozenset[str] = frozenset(get_args(ArgumentKind))


def _default(text: str) -> Argument:
    if text.startswith("["):
        return tuple(_atom(item) for item in text[1:-1].split())
    return _atom(text)


def _atom(text: str) -> Atom:
    words: dict[str, Atom] = {"none": None, "true": True, "false": False}
    if text in words:
        return words[text]
    if text in _WORDS["dtype"]:
        return Keyword("dtype", text)
    if text in _WORDS["memory_format"]:
        return Keyword("memory_format", text)
    if text.startswith("'"):
        return text.strip("'")
    try:
        return int(text)
    except ValueError:
        return float(text)


def _parameters(text: str) -> Iterable[Parameter]:
    keyword_only = False
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part == "*":
            keyword_only = True
            continue
        name, _, rest = part.partition(":")
        written, equals, default = rest.partition("=")
        kind = written.strip()
        items_optional = kind == "tensors?"
        optional = kind.endswith("?") and not items_optional
        kind = kind.rstrip("?")
        assert kind in _KINDS, part
        yield Parameter(
            name=name.strip(),
            kind=kind,  # type: ignore[arg-type]
            optional=optional,
            items_optional=items_optional,
            required=not equals,
            default=_default(default.strip()) if equals else None,
            keyword_only=keyword_only,
        )


def define(
    signatures: str,
    op_class: OpClass,
    *,
    view: str | None = None,
    mutates: tuple[str, ...] = (),
    random: bool = False,
    differentiable: bool = True,
    flops: FlopRule | None = None,
    saves: tuple[str, ...] = (),
    extra: ByteRule | None = None,
    workspace: ByteRule | None = None,
    backward_workspace: ByteRule | None = None,
) -> tuple[Operator, ...]:
    """Return the operators of one or more signatures (one on each line) that share all other properties."""
    defined = []
    for line in filter(None, (line.strip() for line in signatures.splitlines())):
        match = _SIGNATURE.fullmatch(line)
        assert match is not None, line
        parameters = tuple(_parameters(match[2]))
        count: int | Literal["list"] = "list" if match[3] == "list" else int(match[3] or 1)
        defined.append(
            Operator(
                name=match[1],
                parameters=parameters,
                outputs=count,
                op_class=op_class,
                view=view,
                mutates=mutates,
                random=random,
                differentiable=differentiable,
                flops=flops,
                saves=saves,
                extra=extra,
                workspace=workspace,
                backward_workspace=backward_workspace,
                by_name={parameter.name: parameter for parameter in parameters},
            )
        )
    return tuple(defined)
