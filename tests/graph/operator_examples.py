"""One call of each operator that a gradient passes through, for comparing the vocabulary's claims with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def number(*shape: int, trained: bool = True) -> Tensor:
    """Return positive numbers below one, so that every function is defined and smooth there."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (0.2 + 0.6 * torch.rand(shape, generator=generator)).requires_grad_(trained)


def index(high: int, *shape: int) -> Tensor:
    """Return integers in [0, high)."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(len(shape)))


X, Y = (64, 48), (48, 32)
IMAGE = (2, 16, 12, 12)
MASK = (index(2, *X) > 0) | (torch.arange(48) == 0)

Example = tuple[str, list[Any], dict[str, Any]]


def _unary() -> list[Example]:
    names = (
        "gelu silu mish elu selu celu leaky_relu hardtanh relu6 hardswish hardsigmoid softplus log log1p log2 abs sin "
        "cos sinh cosh asin acos atan erf square nan_to_num relu tanh tan sigmoid exp expm1 sqrt rsqrt reciprocal neg "
        "tril triu clone log_sigmoid mean sum prod amax amin max min norm.Scalar sign floor round"
    )
    made: list[Example] = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        made.append((f"aten.{packet}.{overload or 'default'}", [number(*X)], {}))
    return made


def examples() -> list[Example]:
    """Return (operator, positional arguments, keyword arguments); tensors to be trained require gradients."""
    x, other, bias = number(*X), number(*X), number(32)
    weight = number(32, 48)
    image, kernel = number(*IMAGE), number(8, 16, 3, 3)
    query, key = number(2, 4, 24, 8), number(2, 4, 24, 8)
    value = number(2, 4, 24, 8)
    frozen = number(*X, trained=False)
    return [
        *_unary(),
        ("aten.linear.default", [x, weight, bias], {}),
        ("aten.linear.default", [frozen, weight, bias], {}),
        ("aten.linear.default", [x, number(32, 48, trained=False)], {}),
        ("aten.matmul.default", [number(4, *X), number(*Y)], {}),
        ("aten.matmul.default", [number(4, *X), number(4, *Y)], {}),
        ("aten.mm.default", [x, number(*Y)], {}),
        ("aten.bmm.default", [number(4, *X), number(4, *Y)], {}),
        ("aten.addmm.default", [bias, x, number(*Y)], {}),
        ("aten.baddbmm.default", [number(4, 64, 32), number(4, *X), number(4, *Y)], {}),
        ("aten.mv.default", [x, number(48)], {}),
        ("aten.dot.default", [number(4096), other.detach().reshape(-1)[:1].expand(4096).clone().requires_grad_()], {}),
        ("aten.outer.default", [number(1000), number(1001)], {}),
        ("aten.conv1d.default", [number(2, 16, 100), number(8, 16, 3)], {}),
        ("aten.conv2d.default", [image, kernel, number(8), [1, 1], [1, 1]], {}),
        ("aten.conv2d.padding", [image, kernel, None, [1, 1], "same"], {}),
        ("aten.conv3d.default", [number(1, 16, 8, 8, 8), number(8, 16, 3, 3, 3)], {}),
        ("aten.conv_transpose2d.input", [image, number(16, 8, 3, 3)], {}),
        ("aten.scaled_dot_product_attention.default", [query, key, value], {"is_causal": True}),
        ("aten.scaled_dot_product_attention.default", [query, key, value, torch.ones(24, 24) > 0], {}),
        ("aten.add.Tensor", [x, other], {}),
        ("aten.sub.Tensor", [x, 2], {}),
        ("aten.rsub.Scalar", [x, 1.0], {}),
        ("aten.mul.Tensor", [x, other], {}),
        ("aten.mul.Tensor", [x, 0.5], {}),
        ("aten.mul.Tensor", [x, frozen], {}),
        ("aten.div.Tensor", [x, other], {}),
        ("aten.div.Tensor", [frozen, other], {}),
        ("aten.div.Tensor", [x, frozen], {}),
        ("aten.pow.Tensor_Scalar", [x, 3], {}),
        ("aten.pow.Tensor_Tensor", [x, other], {}),
        ("aten.pow.Scalar", [2.0, x], {}),
        ("aten.maximum.default", [x, other], {}),
        ("aten.minimum.default", [x, other], {}),
        ("aten.atan2.default", [x, other], {}),
        ("aten.logaddexp.default", [x, other], {}),
        ("aten.clamp.default", [x, 0.3, 0.6], {}),
        ("aten.clamp_min.default", [x, 0.3], {}),
        ("aten.clamp_max.default", [x, 0.3], {}),
        ("aten.threshold.default", [x, 0.3, 0.0], {}),
        ("aten.glu.default", [x], {}),
        ("aten.prelu.default", [x, number(1)], {}),
        ("aten.lerp.Scalar", [x, other, 0.5], {}),
        ("aten.lerp.Tensor", [x, other, number(*X)], {}),
        ("aten.addcmul.default", [number(*X), x, other], {}),
        ("aten.where.self", [MASK, x, other], {}),
        ("aten.where.ScalarOther", [MASK, x, 0.0], {}),
        ("aten.masked_fill.Scalar", [x, MASK, 0.0], {}),
        ("aten.layer_norm.default", [x, [48], number(48), number(48)], {}),
        ("aten.rms_norm.default", [x, [48], number(48)], {}),
        ("aten.group_norm.default", [image, 4, number(16), number(16)], {}),
        (
            "aten.batch_norm.default",
            [image, number(16), number(16), torch.zeros(16), torch.ones(16), True, 0.1, 1e-5, True],
            {},
        ),
        ("aten.softmax.int", [x, -1], {}),
        ("aten.log_softmax.int", [x, -1], {}),
        ("aten.dropout.default", [x, 0.5, True], {}),
        ("aten.dropout.default", [x, 0.5, False], {}),
        ("aten.feature_dropout.default", [image, 0.5, True], {}),
        ("aten.mean.dim", [x, [-1], True], {}),
        ("aten.sum.dim_IntList", [x, [0]], {}),
        ("aten.cumsum.default", [x, 1], {}),
        ("aten.var.correction", [x, [1]], {"correction": 1}),
        ("aten.std.correction", [x, [1]], {"correction": 1}),
        ("aten.var_mean.correction", [x, [1]], {"correction": 1}),
        ("aten.var_mean.dim", [x, [1], True, True], {}),
        ("aten.logsumexp.default", [x, [1]], {}),
        ("aten.linalg_vector_norm.default", [x, 2, [1]], {}),
        ("aten.max.dim", [x, 1], {}),
        ("aten.topk.default", [x, 4], {}),
        ("aten.sort.default", [x], {}),
        ("aten.max_pool2d.default", [image, [2, 2]], {}),
        ("aten.avg_pool2d.default", [image, [2, 2]], {}),
        ("aten.adaptive_avg_pool2d.default", [image, [3, 3]], {}),
        ("aten.upsample_nearest2d.vec", [image, None, [2.0, 2.0]], {}),
        ("aten.cross_entropy_loss.default", [x, index(48, 64)], {}),
        ("aten.cross_entropy_loss.default", [x, index(48, 64)], {"label_smoothing": 0.1}),
        ("aten.nll_loss.default", [x, index(48, 64)], {}),
        ("aten.mse_loss.default", [x, frozen], {}),
        ("aten.l1_loss.default", [x, frozen], {}),
        ("aten.smooth_l1_loss.default", [x, frozen], {}),
        ("aten.huber_loss.default", [x, frozen], {}),
        ("aten.soft_margin_loss.default", [x, frozen], {}),
        ("aten.binary_cross_entropy.default", [x, frozen], {}),
        ("aten.binary_cross_entropy_with_logits.default", [x, frozen], {}),
        ("aten.kl_div.default", [x, frozen], {}),
        ("aten.cosine_similarity.default", [x, other], {}),
        ("aten.embedding.default", [number(100, 48), index(100, 64)], {}),
        ("aten.index.Tensor", [x, [index(64, 200)]], {}),
        ("aten.index_select.default", [x, 0, index(64, 200)], {}),
        ("aten.gather.default", [x, 1, index(48, 64, 4)], {}),
        ("aten.scatter.src", [x, 1, index(48, 64, 4), number(64, 4)], {}),
        ("aten.scatter_add.default", [x, 1, index(48, 64, 4), number(64, 4)], {}),
        ("aten.index_add.default", [x, 0, index(64, 8), number(8, 48)], {}),
        ("aten.index_copy.default", [x, 0, torch.arange(8), number(8, 48)], {}),
        ("aten.index_put.default", [x, [index(64, 8)], number(8, 48), True], {}),
        ("aten.cat.default", [[x, other], 1], {}),
        ("aten.stack.default", [[x, other]], {}),
        ("aten.repeat.default", [x, [2, 1]], {}),
        ("aten.repeat_interleave.self_int", [x, 2, 0], {}),
        ("aten.roll.default", [x, [1], [0]], {}),
        ("aten.flip.default", [x, [0]], {}),
        ("aten.constant_pad_nd.default", [x, [1, 1]], {}),
        ("aten.pad.default", [x, [1, 1]], {}),
        ("aten.select_scatter.default", [x, number(48), 0, 3], {}),
        ("aten.pixel_shuffle.default", [image, 2], {}),
        ("aten.to.dtype", [x, torch.float64], {}),
        ("aten.to.dtype", [x, torch.float32], {}),
        ("aten.transpose.int", [x, 0, 1], {}),
        ("aten.reshape.default", [x, [48, 64]], {}),
        ("aten.contiguous.default", [x], {}),
        ("aten.expand.default", [number(1, 48), [64, 48]], {}),
        ("aten.slice.Tensor", [x, 0, 3, 9], {}),
        ("aten.split.Tensor", [x, 16], {}),
        ("aten.detach.default", [x], {}),
        ("aten.einsum.default", ["ij,jk->ik", [x, number(*Y)]], {}),
    ]
