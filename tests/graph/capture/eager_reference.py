"""Comparison of a captured graph with the module that it was captured from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusionai.graph.capture import Captured
from fusionai.graph.capture.dtypes import TORCH_DTYPES
from fusionai.graph.capture.interpreter import interpret
from fusionai.graph.model import WeightKey


def graph_weights(captured: Captured) -> dict[WeightKey, Tensor]:
    """Return the weights of a graph as it hands them out, ready to be differentiated."""
    tensors = {}
    for weight in captured.graph.weights:
        data = captured.read(weight.key)
        dtype = TORCH_DTYPES[data.dtype]
        flat = torch.frombuffer(bytearray(data.data), dtype=dtype) if data.nbytes else torch.empty(0, dtype=dtype)
        tensors[weight.key] = flat.reshape(data.shape).requires_grad_(weight.trainable)
    return tensors


def assert_same_training_step(
    captured: Captured, module: nn.Module, inputs: Mapping[str, Tensor], expected_loss: Tensor
) -> None:
    """Assert that loss, gradients and written buffers of a graph equal the eager module's.

    `expected_loss` is what the module gave on `inputs`, not yet differentiated.
    """
    weights = graph_weights(captured)
    # The module has already written to its buffers; the graph wrote nothing yet.
    names = {weight.name: weights[weight.key] for weight in captured.graph.weights}
    loss = interpret(captured.graph, inputs, names)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    module.zero_grad()
    expected_loss.backward()
    loss.backward()
    compared = 0
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # A parameter that the loss does not depend on is not in the graph.
        found = weights[WeightKey(name)].grad if WeightKey(name) in weights else None
        expected = parameter.grad
        assert (found is None) == (expected is None), name
        if expected is not None:
            assert found is not None
            # Some gradients are zero in exact arithmetic (attention's key biases): compare on the scale of all.
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
            compared += 1
    assert compared
    for name, buffer in module.named_buffers():
        if WeightKey(name) in weights:
            torch.testing.assert_close(weights[WeightKey(name)], buffer, rtol=1e-5, atol=1e-6)
