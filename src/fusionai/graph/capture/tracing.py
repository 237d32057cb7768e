"""Runs torch.export on a module, and explains in a line or two why it did not work."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fusionai.errors import GraphError
from fusionai.graph.capture.inputs import ExampleInput
from fusionai.graph.capture.lost_arguments import keeping_arguments

log = logging.getLogger(__name__)

LossFunction = Callable[[Any, Any], Tensor]
"""Takes the module's output and the labels (a tensor, or a dict of them when there are several)."""

MODULE_PREFIX = "module."
"""Where `LossOf` keeps the captured module; weights and scopes lose this prefix again."""

_TALKATIVE = ("torch.fx.experimental.symbolic_shapes", "torch.fx.experimental.proxy_tensor", "torch.export")
"""Loggers of torch that describe a failed export at length."""

LONGEST_CAUSE = 300
"""Characters of torch's explanation that an error repeats."""


class LossOf(nn.Module):
    """A module whose only output is the scalar loss of another."""

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction | None,
        inputs: Sequence[ExampleInput],
        fixed: Mapping[str, object],
    ) -> None:
        super().__init__()
        self.module = module
        # In a tuple, a loss that is itself a module is not registered: it holds no weights of the model.
        self._loss = (loss,)
        self._fixed = dict(fixed)
        self._labels = [item.name for item in inputs if item.role == "labels"] if loss is not None else []
        if loss is not None and not self._labels:
            raise GraphError("a loss function was given, but no input has the role 'labels'; give roles={...}")

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss, a 0-dimensional floating-point tensor; GraphError when the module gives none."""
        labels = {name: inputs[name] for name in self._labels}
        arguments = {name: tensor for name, tensor in inputs.items() if name not in labels}
        output = self.module(**arguments, **self._fixed)
        loss = self._loss[0]
        if loss is not None:
            output = loss(output, next(iter(labels.values())) if len(labels) == 1 else labels)
        return _scalar_loss(output)


def _scalar_loss(output: Any) -> Tensor:
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    elif hasattr(output, "loss"):
        found = output.loss
    if not isinstance(found, Tensor):
        raise GraphError(
            f"the module returned no loss but {type(output).__name__}: return a scalar loss, (loss, ...) or "
            'something with a "loss", or pass loss=function(output, labels)'
        )
    if found.ndim or not found.is_floating_point():
        shape = ", ".join(str(size) if isinstance(size, int) else "?" for size in found.shape)
        raise GraphError(
            f"the loss must be one floating-point number, but has shape [{shape}] and dtype "
            f"{found.dtype}: reduce it, for example by its mean"
        )
    return found


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Put an evaluating module into training mode, and restore everything about it afterwards.

    A module that is already training is left alone, so submodules that were frozen on purpose stay frozen. Attributes
    that forward sets while it is traced, such as a cache of masks, are removed: they would hold tensors without data.
    """
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (each, dict(vars(each)), {table: dict(vars(each)[table]) for table in tables}) for each in module.modules()
    ]
    try:
        if not module.training:
            module.train()
        yield
    finally:
        for each, attributes, contents in before:
            vars(each).clear()
            vars(each).update(attributes)
            for table, content in contents.items():
                attributes[table].clear()
                attributes[table].update(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch logs and prints to stderr about a failed export. The error says it in a line."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, _TALKATIVE)]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def trace(root: LossOf, inputs: Sequence[ExampleInput]) -> ExportedProgram:
    """Trace a module's loss into torch's training IR, with every dynamic axis symbolic.

    Raises GraphError, naming the cause, when torch cannot trace it.
    """
    arguments = {item.name: item.tensor for item in inputs}
    axes = {item.name: dict.fromkeys(item.axes, Dim.DYNAMIC) for item in inputs}
    try:
        with _quiet(), keeping_arguments():
            return torch.export.export(root, (arguments,), dynamic_shapes=(axes,), strict=False)
    except GraphError:
        raise
    except Exception as error:
        log.debug("torch.export failed", exc_info=True)
        raise GraphError(_explain(root.module, error, inputs)) from None


def _explain(module: nn.Module, error: Exception, inputs: Sequence[ExampleInput]) -> str:
    name, text = type(module).__name__, str(error)
    where = _user_line(error)
    if "onstraints violated" in text or "specializ" in text.lower():
        fixed = [
            f"axis {axis} ({axis_name}) of input {item.name!r}"
            for item in inputs
            for axis, axis_name in item.axes.items()
            if re.search(rf"\[{item.name!r}\][^\n]*\[{axis}\]", text)
        ] or ["a dynamic axis"]
        return (
            f"{name} cannot be captured for every size: its code fixes {' and '.join(fixed)}{where}; make it "
            "work for every size, or leave the axis out of dynamic={...}"
        )
    if type(error).__name__.startswith("GuardOnDataDependent") or "data-dependent" in text.lower():
        return (
            f"{name} cannot be captured: its control flow or a shape depends on the values in a tensor{where}; "
            "write it with torch.where, masks, or a fixed number of iterations"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    cause = lines[0][:LONGEST_CAUSE]
    return f"{name} cannot be captured{where}: {type(error).__name__}: {cause}"


def _user_line(error: BaseException) -> str:
    """Return " (file.py:12, in forward)" for the deepest line that is not torch's own."""
    found = ""
    trace_back = error.__traceback__
    while trace_back is not None:
        code = trace_back.tb_frame.f_code
        module = trace_back.tb_frame.f_globals.get("__name__", "")
        ours = module.startswith(("torch.", "fusionai.")) or module == "torch"
        if not ours and not code.co_filename.startswith("<"):
            file = re.split(r"[/\\]", code.co_filename)[-1]
            found = f" ({file}:{trace_back.tb_lineno}, in {code.co_name})"
        trace_back = trace_back.tb_next
    return found
