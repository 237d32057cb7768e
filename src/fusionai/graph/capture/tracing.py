"""Runs torch.export on a module, and explains in a line or two why it did not work."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fusionai.errors import GraphError
from fusionai.graph.capture.assigned_buffers import tensor_memory, write_back
from fusionai.graph.capture.call_state import CallChanges, Snapshot
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
        self.changes = CallChanges()
        """What the last call changed of the module, beside its tensors."""
        # The modules themselves: while a trace runs, an attribute gives a stand-in for each of them.
        self._parts = ({"": module, **({"loss": loss} if isinstance(loss, nn.Module) else {})},)
        self._labels = [item.name for item in inputs if item.role == "labels"] if loss is not None else []
        if loss is not None and not self._labels:
            raise GraphError("a loss function was given, but no input has the role 'labels'; give roles={...}")

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss, a 0-dimensional floating-point tensor. Buffers that the call assigned are written in place.

        Raises GraphError when the module gives no loss, and for changes of its tensors that no write can express.
        """
        before = Snapshot(self._parts[0])
        memory = tensor_memory(before)
        labels = {name: inputs[name] for name in self._labels}
        arguments = {name: tensor for name, tensor in inputs.items() if name not in labels}
        output = self.module(**arguments, **self._fixed)
        loss = self._loss[0]
        if loss is not None:
            output = loss(output, next(iter(labels.values())) if len(labels) == 1 else labels)
        write_back(before, memory)
        self.changes.last = tuple(before.changes())
        return _scalar_loss(output)

    def parts(self) -> dict[str, nn.Module]:
        """Return the module, its submodules, and those of a loss that is a module itself, by path."""
        return Snapshot(self._parts[0]).modules


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
def _quiet() -> Iterator[None]:
    """Hide what torch logs and prints to stderr about a failed export. The error says it in a line."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, _TALKATIVE)]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            # Attributes are compared by `LossOf`, which knows when they matter.
            warnings.filterwarnings("ignore", message=r"(?s).*assigned during export")
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
    on_data = type(error).__name__.startswith("GuardOnDataDependent") or "data-dependent" in text.lower()
    if not on_data and ("onstraints violated" in text or "specializ" in text.lower()):
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
    if on_data:
        return (
            f"{name} cannot be captured: its control flow or a shape depends on the values in a tensor{where}; "
            "write it with torch.where, masks, or a fixed number of iterations"
        )
    if "fake tensor in the exported program" in text:
        return (
            f"{name} cannot be captured: it takes .data of a parameter or buffer, or keeps a tensor outside of its "
            "parameters and buffers; use .detach() to read one, and assign to a buffer to change it"
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
