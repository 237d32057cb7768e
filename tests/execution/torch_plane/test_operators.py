"""Operators of our own against independent references, optimizers against torch's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.moe import _grouped_mm_fallback, _grouped_mm_fallback_bwd
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fusionai.execution.plane import OptimizerConfig
from fusionai.execution.program import MicrobatchKey
from fusionai.execution.torch_plane.attention import attention, needs_mask, window_mask
from fusionai.execution.torch_plane.experts import grouped_matmul
from fusionai.execution.torch_plane.operators import torch_callable
from fusionai.execution.torch_plane.optimizers import Optimizer
from fusionai.execution.torch_plane.randomness import random_seed
from fusionai.execution.torch_plane.tensors import from_data, to_data
from fusionai.graph.inference import in_inference
from fusionai.graph.model import Node, Ref, ValueName, WeightKey
from fusionai.graph.vocabulary import VOCABULARY
from fusionai.tensor import ITEM_BYTES, TensorData

torch.set_num_threads(1)


def leaves(heads: int, groups: int, tokens: int, size: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    shapes = [(2, heads, tokens, size), (2, groups, tokens, size), (2, groups, tokens, size)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def mask_for(tokens: int, window: int, softcap: float, causal: bool) -> torch.Tensor | None:
    if not needs_mask(tokens, window=window, softcap=softcap, causal=causal):
        return None
    return window_mask(tokens, window, causal, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 3])
def test_attention_equals_transformers_bit_for_bit(
    dtype: torch.dtype, causal: bool, tokens: int, groups: int, window: int
) -> None:
    """Forward and gradients; the mask of the reference is written out by its definition."""
    if window and not causal:
        pytest.skip("no model of the vocabulary's looks both ways through a window")
    heads = 4
    ours, theirs = leaves(heads, groups, tokens), leaves(heads, groups, tokens)
    mask = None
    if 0 < window <= tokens:
        allowed = [[0 <= row - column < window for column in range(tokens)] for row in range(tokens)]
        mask = torch.tensor(allowed)[None, None].expand(2, 1, tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = attention(*ours, 0, 0.25, window, 0.0, causal, mask_for(tokens, window, 0.0, causal))
        module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=causal)
        wanted, _ = sdpa_attention_forward(module, *theirs, mask, scaling=0.25)  # type: ignore[arg-type]
    wanted = wanted.transpose(1, 2)
    assert torch.equal(found, wanted)
    gradient = torch.randn(found.shape).to(found.dtype)
    found.backward(gradient)
    wanted.backward(gradient)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 3])
def test_attention_with_bounded_scores(causal: bool, window: int) -> None:
    query, key, value = leaves(4, 2, 6)
    found = attention(query, key, value, 0, 0.25, window, 5.0, causal, mask_for(6, window, 5.0, causal))
    for batch in range(2):
        for head in range(4):
            for row in range(6):
                reach = range(6) if not causal else range(row + 1)
                near = [c for c in reach if not window or (row - c < window if causal else abs(row - c) <= window)]
                scores = torch.stack([query[batch, head, row] @ key[batch, head // 2, c] * 0.25 for c in near])
                share = torch.softmax(5.0 * torch.tanh(scores / 5.0), 0)
                wanted = share @ value[batch, head // 2, near]
                torch.testing.assert_close(found[batch, head, row], wanted)


def test_grouped_matmul_equals_transformers() -> None:
    tokens, weights = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4, 3, requires_grad=True)
    ends = torch.tensor([2, 2, 6, 8, 8])  # two experts without tokens, one token beyond the last end
    found = grouped_matmul(tokens, weights, ends)
    assert torch.equal(found, _grouped_mm_fallback(tokens.detach(), weights.detach(), ends))
    gradient = torch.randn(9, 3)
    found.backward(gradient)
    wanted = _grouped_mm_fallback_bwd(tokens.detach(), weights.detach(), ends, gradient)
    assert tokens.grad is not None
    assert weights.grad is not None
    assert torch.equal(tokens.grad, wanted[0])
    assert torch.equal(weights.grad, wanted[1])
    assert torch.autograd.gradcheck(
        lambda t, w: grouped_matmul(t, w, ends), (tokens.detach().double().requires_grad_(), weights.double())
    )


def test_every_operator_of_the_vocabulary_runs_here() -> None:
    for name in VOCABULARY:
        assert callable(torch_callable(name))


def test_inference_mode_of_calls() -> None:
    x, y = Ref(ValueName("x")), (ValueName("y"),)
    dropout = in_inference(Node("y", "aten.dropout.default", (x, 0.1, True), {}, y))
    assert dropout is not None
    assert dropout.args == (x, 0.1, False)
    sdpa = in_inference(Node("y", "aten.scaled_dot_product_attention.default", (x, x, x), {"dropout_p": 0.1}, y))
    assert sdpa is not None
    assert sdpa.kwargs == {"dropout_p": 0.0}
    assert in_inference(Node("y", "aten.add_.Tensor", (x, 1), {}, y)) is None
    arguments = (x, None, None, None, None, True, 0.1, 1e-5, True)
    without_statistics = Node("y", "aten.batch_norm.default", arguments, {}, y)
    assert in_inference(without_statistics) == without_statistics


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("scalar", [False, True])
def test_the_least_integer_divided_by_minus_one(dtype: torch.dtype, scalar: bool) -> None:
    """Its quotient has no representation; the processor's division stops a process at it."""
    dividend = torch.tensor([torch.iinfo(dtype).min, 7, -7, 6], dtype=dtype)
    divisor: Any = -1 if scalar else torch.tensor([-1, -1, 2, -4], dtype=dtype)
    found = torch_callable("aten.div.Tensor_mode")(dividend, divisor, rounding_mode="trunc")
    assert found.dtype == dtype
    expected = [torch.iinfo(dtype).min, -7, 7, -6] if scalar else [torch.iinfo(dtype).min, -7, -3, -1]
    assert found.tolist() == expected


@pytest.mark.parametrize("mode", [None, "trunc", "floor"])
def test_other_divisions_are_torchs(mode: str | None) -> None:
    for dividend, divisor in ((torch.randn(50), torch.randn(50)), (torch.arange(-9, 9), torch.arange(1, 19))):
        found = torch_callable("aten.div.Tensor_mode")(dividend, divisor, rounding_mode=mode)
        wanted = torch.div(dividend, divisor, rounding_mode=mode)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


CONFIGS = [
    OptimizerConfig(),
    OptimizerConfig(weight_decay=0.1, beta1=0.8, epsilon=1e-6),
    OptimizerConfig(kind="sgd"),
    OptimizerConfig(kind="sgd", momentum=0.9, weight_decay=0.1),
]


def torch_optimizer(config: OptimizerConfig, weights: list[torch.Tensor], *, fused: bool) -> torch.optim.Optimizer:
    decay = config.weight_decay
    if config.kind == "sgd":
        return torch.optim.SGD(weights, 1e-2, config.momentum, weight_decay=decay, fused=fused)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(weights, 1e-2, betas, config.epsilon, decay, fused=fused)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_equal_torch_bit_for_bit(config: OptimizerConfig, fused: bool) -> None:
    """The block form of CPUs and the fused form of accelerators (which CPUs can run too)."""
    torch.manual_seed(0)
    shapes = [(7,), (300, 1000), (3, 5), ()]  # 300,000 elements: more than a block
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizer = Optimizer(config, torch.device("cpu"), fused=fused)
    # torch's fused SGD cannot take a weight whose first gradient comes late, so its default form stands in.
    wanted = torch_optimizer(config, [*theirs], fused=fused and config.kind == "adamw")
    named = [(WeightKey(str(index)), weight) for index, weight in enumerate(ours)]
    for step in range(4):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            skipped = index == 2 and step % 2 == 0
            one.grad = None if skipped else torch.randn(one.shape)
            other.grad = None if one.grad is None else one.grad.clone() * 0.5
        optimizer.update(named, 1e-2, 0.5)
        wanted.step()
    tolerance = 1e-6 if fused and config.kind == "sgd" else 0.0
    for (key, one), other in zip(named, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        for name in config.states:
            found = optimizer.state(key, name)
            torch.testing.assert_close(found, wanted.state[other][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3, 4)])
def test_tensors_survive_the_border(dtype: str, shape: tuple[int, ...]) -> None:
    value = (torch.rand(shape) * 10).to(getattr(torch, dtype))
    sent = to_data(value)
    assert (sent.dtype, sent.shape) == (dtype, shape)
    assert torch.equal(from_data(sent, torch.device("cpu")), value)
    for offset in (0, 1, 3, 64):  # as a frame's payload lies: at any address
        frame = bytearray(offset) + bytearray(sent.data)
        received = TensorData(sent.dtype, sent.shape, memoryview(frame)[offset:])
        assert torch.equal(from_data(received, torch.device("cpu")), value)


def test_contiguous_tensors_are_shared_and_others_laid_out() -> None:
    value = torch.arange(6.0).view(2, 3)
    shared, copied = to_data(value), to_data(value, copy=True)
    back = from_data(shared, torch.device("cpu"))
    value[0, 0] = 9
    assert back[0, 0] == 9
    assert memoryview(copied.data).cast("B")[:4].tobytes() == bytes(4)
    turned = from_data(to_data(value.T), torch.device("cpu"))
    assert torch.equal(turned, value.T)
    assert turned.is_contiguous()


def test_seeds_differ_in_every_part() -> None:
    parts = [(a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4)]
    seeds = {random_seed(a, MicrobatchKey(b, c), d) for a, b, c, d in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
