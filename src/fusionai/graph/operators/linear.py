"""Matrix products, convolutions and attention: the operators whose time is FLOPs.

Letters in comments: B batch, H heads, T queries, S keys, D and V widths of a head.
"""

from __future__ import annotations

import math

from fusionai.graph.operators.schema import ConcreteCall, FlopRule, Operand, define


def _needed(call: ConcreteCall, *names: str) -> int:
    return sum(call.tensor(name).needs_gradient for name in names)


def _linear_flops(call: ConcreteCall) -> tuple[int, int]:
    forward = 2 * call.outputs[0].count * call.tensor("weight").shape[-1]
    return forward, forward * _needed(call, "input", "weight")


def _matmul_flops(left: str, right: str) -> FlopRule:
    def rule(call: ConcreteCall) -> tuple[int, int]:
        forward = 2 * call.outputs[0].count * call.tensor(left).shape[-1]
        return forward, forward * _needed(call, left, right)

    return rule


def _einsum_flops(call: ConcreteCall) -> tuple[int, int]:
    """Count a product over all indices for every operand after the first: torch contracts in that order."""
    operands = call.tensors("tensors")
    terms = str(call.arguments["equation"]).split("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=False):
        named = term.replace("...", "")
        axes = list(operand.shape)
        if "..." in term:
            before = term.index("...")
            count = len(axes) - len(named)
            for axis, size in enumerate(axes[before : before + count]):
                label = f"...{count - axis}"
                sizes[label] = max(size, sizes.get(label, 1))
            axes[before : before + count] = []
        for label, size in zip(named, axes, strict=False):
            sizes[label] = max(size, sizes.get(label, 1))
    forward = 2 * math.prod(sizes.values()) * max(0, len(operands) - 1)
    return forward, forward * sum(operand.needs_gradient for operand in operands)


def _convolution_flops(call: ConcreteCall) -> tuple[int, int]:
    weight = call.tensor("weight")
    forward = 2 * call.outputs[0].count * math.prod(weight.shape[1:])
    return forward, forward * _needed(call, "input", "weight")


def _transposed_convolution_flops(call: ConcreteCall) -> tuple[int, int]:
    weight = call.tensor("weight")
    forward = 2 * call.tensor("input").count * math.prod(weight.shape[1:])
    return forward, forward * _needed(call, "input", "weight")


_CHANNEL_BLOCK = 16
"""CPU kernels work on copies whose channels come in blocks of this many, the last one filled up."""


def _blocked(operand: Operand) -> int:
    channels = operand.shape[1] if len(operand.shape) > 2 else _CHANNEL_BLOCK
    return operand.nbytes // max(1, channels) * -(-channels // _CHANNEL_BLOCK) * _CHANNEL_BLOCK


def _blocked_output(call: ConcreteCall) -> int:
    return _blocked(call.outputs[0])


def _blocked_gradients(call: ConcreteCall) -> int:
    """Return the bytes of the gradients that CPU kernels keep in blocks: the output's and, for a while, the input's."""
    source = call.tensor("input")
    return _blocked(call.outputs[0]) + (_blocked(source) - source.nbytes if source.needs_gradient else 0)


def _attention_flops(call: ConcreteCall) -> tuple[int, int]:
    """Count the scores and their product with the values. Backward does five such products: it computes scores again.

    Masked positions count too, as they do when a device's achieved FLOP/s is measured.
    """
    query, value = call.tensor("query"), call.tensor("value")
    scores = _scores(call)
    width, value_width = query.shape[-1], value.shape[-1]
    forward = 2 * scores * (width + value_width)
    backward = 2 * scores * (3 * width + 2 * value_width)
    return forward, backward if _needed(call, "query", "key", "value") else 0


def _scores(call: ConcreteCall) -> int:
    """Return the number of attention scores: B * H * T * S."""
    return math.prod(call.tensor("query").shape[:-1]) * call.tensor("key").shape[-2]


def _log_sums(call: ConcreteCall) -> int:
    """Return the bytes of the log-sum-exp of all queries: (B, H, T), at least in single precision."""
    query = call.tensor("query")
    return math.prod(query.shape[:-1]) * max(4, query.nbytes // max(1, query.count))


def _repeated(call: ConcreteCall) -> int:
    """Return the bytes of keys and values repeated for grouped queries, for kernels that need as many heads of each."""
    query, key, value = call.tensor("query"), call.tensor("key"), call.tensor("value")
    groups = query.shape[-3] // max(1, key.shape[-3]) if len(query.shape) > 3 else 1
    return (key.nbytes + value.nbytes) * groups if groups > 1 else 0


def _item_bytes(call: ConcreteCall) -> int:
    query = call.tensor("query")
    return query.nbytes // max(1, query.count)


def _sdpa_extra(call: ConcreteCall) -> int:
    """Return the bytes that autograd keeps: of the fused kernel the log-sum-exp, and with dropout the scores.

    With dropout torch does not use the fused kernel. A boolean mask is kept as numbers.
    """
    mask = call.tensor("attn_mask") if call.has("attn_mask") else None
    made = mask.count * _item_bytes(call) if mask is not None and mask.dtype == "bool" else 0
    if call.number("dropout_p") > 0 or (mask is not None and mask.needs_gradient):
        return 3 * _scores(call) * _item_bytes(call) + made + _repeated(call)
    return _log_sums(call) + made


def _fusion_attention_extra(call: ConcreteCall) -> int:
    """Return what `_sdpa_extra` does, and more: a window needs a mask (T, S), and a soft cap keeps two sets of scores.

    With a window or a soft cap, keys and values that several heads share are repeated, and kept in that form.
    """
    query, key, value = call.tensor("query"), call.tensor("key"), call.tensor("value")
    repeated = _repeated(call)
    instead = repeated - key.nbytes - value.nbytes if repeated else 0
    if call.number("softcap") > 0:
        return 2 * _scores(call) * _item_bytes(call) + instead
    if 0 < call.number("window") <= query.shape[-2]:
        return _log_sums(call) + query.shape[-2] * key.shape[-2] * _item_bytes(call) + instead
    return _log_sums(call)


def _linear_like(left: str, right: str) -> tuple[str, ...]:
    return (f"{left} if {right}", f"{right} if {left}")


_CONVOLUTION = """
aten.conv1d.default({0}, stride: ints = [1], padding: ints = [0], dilation: ints = [1], groups: int = 1)
aten.conv1d.padding({0}, stride: ints = [1], padding: string = 'valid', dilation: ints = [1], groups: int = 1)
aten.conv2d.default({0}, stride: ints = [1 1], padding: ints = [0 0], dilation: ints = [1 1], groups: int = 1)
aten.conv2d.padding({0}, stride: ints = [1 1], padding: string = 'valid', dilation: ints = [1 1], groups: int = 1)
aten.conv3d.default({0}, stride: ints = [1 1 1], padding: ints = [0 0 0], dilation: ints = [1 1 1], groups: int = 1)
""".replace("{0}", "input: tensor, weight: tensor, bias: tensor? = none")
_TRANSPOSED = (
    "aten.conv_transpose1d.default(input: tensor, weight: tensor, bias: tensor? = none, stride: ints = [1], "
    "padding: ints = [0], output_padding: ints = [0], groups: int = 1, dilation: ints = [1])\n"
    "aten.conv_transpose2d.input(input: tensor, weight: tensor, bias: tensor? = none, stride: ints = [1 1], "
    "padding: ints = [0 0], output_padding: ints = [0 0], groups: int = 1, dilation: ints = [1 1])"
)
_SDPA = (
    "aten.scaled_dot_product_attention.default(query: tensor, key: tensor, value: tensor, "
    "attn_mask: tensor? = none, dropout_p: float = 0.0, is_causal: bool = false, *, scale: float? = none, "
    "enable_gqa: bool = false)"
)
_FUSION_ATTENTION = (
    "fusion.attention(query: tensor, key: tensor, value: tensor, layer: int, scale: float, window: int, "
    "softcap: float, causal: bool)"
)
"""Attention of a decoder or encoder layer over whole sequences: query (B, H, T, D), key (B, G, S, D), value
(B, G, S, V) with G dividing H; returns (B, H, T, V). `layer` names the KV cache that a decoding plane keeps.
With `window` 0 there is no window, else each query sees itself and the window - 1 positions before it.
With `softcap` 0 there is no cap, else scores become softcap * tanh(scores / softcap)."""

OPERATORS = (
    *define(
        "aten.linear.default(input: tensor, weight: tensor, bias: tensor? = none)",
        "matmul",
        flops=_linear_flops,
        saves=_linear_like("input", "weight"),
    ),
    *define(
        "aten.matmul.default(self: tensor, other: tensor)",
        "matmul",
        flops=_matmul_flops("self", "other"),
        saves=_linear_like("self", "other"),
    ),
    *define(
        """
        aten.mm.default(self: tensor, mat2: tensor)
        aten.bmm.default(self: tensor, mat2: tensor)
        """,
        "matmul",
        flops=_matmul_flops("self", "mat2"),
        saves=_linear_like("self", "mat2"),
    ),
    *define(
        "aten._grouped_mm.default(self: tensor, mat2: tensor, offs: tensor? = none, bias: tensor? = none, "
        "out_dtype: dtype? = none)",
        "matmul",
        flops=_matmul_flops("self", "mat2"),
        saves=(*_linear_like("self", "mat2"), "offs"),
    ),
    *define(
        "transformers.grouped_mm_fallback.default(input: tensor, weight: tensor, offs: tensor)",
        "matmul",
        flops=_matmul_flops("input", "weight"),
        saves=("input", "weight", "offs"),
    ),
    *define(
        "aten.addmm.default(self: tensor, mat1: tensor, mat2: tensor, *, beta: number = 1, alpha: number = 1)",
        "matmul",
        flops=_matmul_flops("mat1", "mat2"),
        saves=_linear_like("mat1", "mat2"),
    ),
    *define(
        "aten.baddbmm.default(self: tensor, batch1: tensor, batch2: tensor, *, beta: number = 1, alpha: number = 1)",
        "matmul",
        flops=_matmul_flops("batch1", "batch2"),
        saves=_linear_like("batch1", "batch2"),
    ),
    *define(
        "aten.mv.default(self: tensor, vec: tensor)",
        "matmul",
        flops=_matmul_flops("self", "vec"),
        saves=_linear_like("self", "vec"),
    ),
    *define(
        "aten.dot.default(self: tensor, tensor: tensor)",
        "matmul",
        flops=_matmul_flops("self", "tensor"),
        saves=_linear_like("self", "tensor"),
    ),
    *define("aten.outer.default(self: tensor, vec2: tensor)", "elementwise", saves=_linear_like("self", "vec2")),
    *define(
        "aten.einsum.default(equation: string, tensors: tensors, *, path: ints? = none)",
        "matmul",
        flops=_einsum_flops,
        saves=("tensors",),
    ),
    *define(
        _CONVOLUTION,
        "convolution",
        flops=_convolution_flops,
        saves=_linear_like("input", "weight"),
        workspace=_blocked_output,
        backward_workspace=_blocked_gradients,
    ),
    *define(
        _TRANSPOSED,
        "convolution",
        flops=_transposed_convolution_flops,
        saves=_linear_like("input", "weight"),
        workspace=_blocked_output,
        backward_workspace=_blocked_gradients,
    ),
    *define(
        _SDPA,
        "attention",
        flops=_attention_flops,
        saves=("query", "key", "value", "output", "attn_mask"),
        extra=_sdpa_extra,
        random=True,
    ),
    *define(
        _FUSION_ATTENTION,
        "attention",
        flops=_attention_flops,
        saves=("query", "key", "value", "output"),
        extra=_fusion_attention_extra,
    ),
)
