"""Captures that are remembered: tests use the same few models again and again, and tracing one takes seconds.

How models are captured is the subject of tests/graph/capture, which does not use this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from fusionai.graph.capture import Captured, capture_transformers
from fusionai.graph.capture.state import ModuleState
from fusionai.graph.model import OpDag

_USERS = ("fusionai.owner.api", "fusionai.owner.model_configuration", "fusionai.owner.headline_models")
_graphs: dict[tuple[Any, ...], OpDag] = {}


def remembering(model: Any, task: Any = "causal", *, name: str = "", **options: Any) -> Captured:
    """Capture a model of transformers; the graph of one with the same class and configuration is used again."""
    modes = tuple(module.training for module in model.modules())
    key = (type(model), model.config.to_json_string(), modes, task, *sorted(options.items()))
    known = _graphs.get(key)
    tensors = {weight: entry.tensor for weight, entry in ModuleState.of(model).entries.items()}
    # A constant that the model made while it was traced is not among its tensors.
    if known is not None and all(weight.key in tensors for weight in known.weights):
        graph = msgspec.structs.replace(known, name=name or str(model.config.model_type))
        return Captured(graph, {weight.key: tensors[weight.key] for weight in graph.weights})
    captured = capture_transformers(model, task, name=name, **options)
    _graphs[key] = captured.graph
    return captured


@contextmanager
def remembered_captures() -> Iterator[None]:
    """Have the package capture models of transformers in this way."""
    with pytest.MonkeyPatch.context() as patch:
        for module in _USERS:
            patch.setattr(f"{module}.capture_transformers", remembering)
        yield
