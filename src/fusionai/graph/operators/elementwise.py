"""Operators on single elements: activations, arithmetic, comparisons, masks. Their time is bytes moved."""

from __future__ import annotations

from fusionai.graph.operators.schema import ConcreteCall, define


def _one_like_input(call: ConcreteCall) -> int:
    return call.tensor("self").nbytes


def _two_like_input(call: ConcreteCall) -> int:
    return 2 * call.tensor("self").nbytes


OPERATORS = (
    *define(
        """
        aten.gelu.default(self: tensor, *, approximate: string = 'none')
        aten.silu.default(self: tensor)
        aten.mish.default(self: tensor)
        aten.elu.default(self: tensor, alpha: number = 1, scale: number = 1, input_scale: number = 1)
        aten.selu.default(self: tensor)
        aten.celu.default(self: tensor, alpha: number = 1.0)
        aten.leaky_relu.default(self: tensor, negative_slope: number = 0.01)
        aten.hardtanh.default(self: tensor, min_val: number = -1, max_val: number = 1)
        aten.relu6.default(self: tensor)
        aten.hardswish.default(self: tensor)
        aten.hardsigmoid.default(self: tensor)
        aten.softplus.default(self: tensor, beta: number = 1, threshold: number = 20)
        aten.threshold.default(self: tensor, threshold: number, value: number)
        aten.glu.default(self: tensor, dim: int = -1)
        aten.log.default(self: tensor)
        aten.log1p.default(self: tensor)
        aten.log2.default(self: tensor)
        aten.abs.default(self: tensor)
        aten.sin.default(self: tensor)
        aten.cos.default(self: tensor)
        aten.sinh.default(self: tensor)
        aten.cosh.default(self: tensor)
        aten.asin.default(self: tensor)
        aten.acos.default(self: tensor)
        aten.atan.default(self: tensor)
        aten.erf.default(self: tensor)
        aten.square.default(self: tensor)
        aten.nan_to_num.default(self: tensor, nan: float? = none, posinf: float? = none, neginf: float? = none)
        aten.clamp.default(self: tensor, min: number? = none, max: number? = none)
        aten.clamp_min.default(self: tensor, min: number)
        aten.clamp_max.default(self: tensor, max: number)
        """,
        "elementwise",
        saves=("self",),
    ),
    *define(
        "aten.pow.Tensor_Scalar(self: tensor, exponent: number)",
        "elementwise",
        saves=("self",),
        backward_workspace=_two_like_input,
    ),
    *define("aten.log_sigmoid.default(self: tensor)", "elementwise", saves=("self",), extra=_one_like_input),
    *define("aten.prelu.default(self: tensor, weight: tensor)", "elementwise", saves=("self", "weight")),
    *define(
        """
        aten.relu.default(self: tensor)
        aten.tanh.default(self: tensor)
        aten.tan.default(self: tensor)
        aten.sigmoid.default(self: tensor)
        aten.exp.default(self: tensor)
        aten.expm1.default(self: tensor)
        aten.sqrt.default(self: tensor)
        aten.rsqrt.default(self: tensor)
        aten.reciprocal.default(self: tensor)
        """,
        "elementwise",
        saves=("output",),
    ),
    *define(
        """
        aten.neg.default(self: tensor)
        aten.sign.default(self: tensor)
        aten.floor.default(self: tensor)
        aten.ceil.default(self: tensor)
        aten.round.default(self: tensor)
        aten.trunc.default(self: tensor)
        aten.div.Tensor_mode(self: operand, other: operand, *, rounding_mode: string?)
        aten.tril.default(self: tensor, diagonal: int = 0)
        aten.triu.default(self: tensor, diagonal: int = 0)
        aten.clone.default(self: tensor, *, memory_format: memory_format? = none)
        aten.lift_fresh_copy.default(self: tensor)
        aten.add.Tensor(self: operand, other: operand, *, alpha: number = 1)
        aten.add.Scalar(self: tensor, other: number, alpha: number = 1)
        aten.sub.Tensor(self: operand, other: operand, *, alpha: number = 1)
        aten.sub.Scalar(self: tensor, other: number, alpha: number = 1)
        aten.rsub.Scalar(self: tensor, other: number, alpha: number = 1)
        aten.rsub.Tensor(self: operand, other: operand, *, alpha: number = 1)
        aten.mul.Scalar(self: tensor, other: number)
        aten.div.Scalar(self: tensor, other: number)
        aten.remainder.Scalar(self: tensor, other: number)
        aten.fmod.Scalar(self: tensor, other: number)
        aten.lerp.Scalar(self: tensor, end: tensor, weight: number)
        """,
        "elementwise",
    ),
    *define(
        "aten.mul.Tensor(self: operand, other: operand)",
        "elementwise",
        saves=("self if other", "other if self"),
    ),
    *define("aten.div.Tensor(self: operand, other: operand)", "elementwise", saves=("self if other", "other")),
    *define(
        "aten.pow.Tensor_Tensor(self: operand, exponent: operand)",
        "elementwise",
        saves=("self", "exponent", "output if exponent"),
    ),
    *define("aten.pow.Scalar(self: number, exponent: tensor)", "elementwise", saves=("exponent", "output")),
    *define(
        """
        aten.maximum.default(self: tensor, other: tensor)
        aten.minimum.default(self: tensor, other: tensor)
        aten.max.other(self: tensor, other: tensor)
        aten.min.other(self: tensor, other: tensor)
        aten.atan2.default(self: tensor, other: tensor)
        aten.logaddexp.default(self: tensor, other: tensor)
        """,
        "elementwise",
        saves=("self", "other"),
    ),
    *define(
        "aten.remainder.Tensor(self: operand, other: operand)",
        "elementwise",
        saves=("self if other", "other if other"),
    ),
    *define(
        "aten.clamp.Tensor(self: tensor, min: tensor? = none, max: tensor? = none)",
        "elementwise",
        saves=("self", "min", "max"),
    ),
    *define(
        "aten.lerp.Tensor(self: tensor, end: tensor, weight: tensor)",
        "elementwise",
        saves=("weight", "self if weight", "end if weight"),
    ),
    *define(
        "aten.addcmul.default(self: tensor, tensor1: tensor, tensor2: tensor, *, value: number = 1)",
        "elementwise",
        saves=("tensor1 if tensor2", "tensor2 if tensor1"),
    ),
    *define(
        "aten.addcdiv.default(self: tensor, tensor1: tensor, tensor2: tensor, *, value: number = 1)",
        "elementwise",
        saves=("tensor1 if tensor2", "tensor2 if tensor1", "tensor2 if tensor2"),
    ),
    *define(
        """
        aten.where.self(condition: tensor, self: operand, other: operand)
        aten.where.ScalarOther(condition: tensor, self: tensor, other: number)
        aten.where.ScalarSelf(condition: tensor, self: number, other: tensor)
        """,
        "elementwise",
        saves=("condition",),
    ),
    *define(
        """
        aten.masked_fill.Scalar(self: tensor, mask: tensor, value: number)
        aten.masked_fill.Tensor(self: tensor, mask: tensor, value: operand)
        """,
        "elementwise",
        saves=("mask",),
    ),
    *define(
        "aten.masked_scatter.default(self: tensor, mask: tensor, source: tensor)",
        "elementwise",
        saves=("mask",),
    ),
    *define(
        """
        aten.floor_divide.default(self: operand, other: operand)
        aten.where.Scalar(condition: tensor, self: number, other: number)
        aten.eq.Tensor(self: operand, other: operand)
        aten.eq.Scalar(self: tensor, other: number)
        aten.ne.Tensor(self: operand, other: operand)
        aten.ne.Scalar(self: tensor, other: number)
        aten.lt.Tensor(self: operand, other: operand)
        aten.lt.Scalar(self: tensor, other: number)
        aten.le.Tensor(self: operand, other: operand)
        aten.le.Scalar(self: tensor, other: number)
        aten.gt.Tensor(self: operand, other: operand)
        aten.gt.Scalar(self: tensor, other: number)
        aten.ge.Tensor(self: operand, other: operand)
        aten.ge.Scalar(self: tensor, other: number)
        aten.isnan.default(self: tensor)
        aten.isinf.default(self: tensor)
        aten.isfinite.default(self: tensor)
        aten.logical_and.default(self: tensor, other: tensor)
        aten.logical_or.default(self: tensor, other: tensor)
        aten.logical_not.default(self: tensor)
        aten.logical_xor.default(self: tensor, other: tensor)
        aten.bitwise_and.Tensor(self: operand, other: operand)
        aten.bitwise_and.Scalar(self: tensor, other: number)
        aten.bitwise_or.Tensor(self: operand, other: operand)
        aten.bitwise_or.Scalar(self: tensor, other: number)
        aten.bitwise_xor.Tensor(self: operand, other: operand)
        aten.bitwise_not.default(self: tensor)
        aten.__and__.Tensor(self: operand, other: operand)
        aten.__and__.Scalar(self: tensor, other: number)
        aten.__or__.Tensor(self: operand, other: operand)
        aten.__or__.Scalar(self: tensor, other: number)
        aten.__xor__.Tensor(self: operand, other: operand)
        """,
        "elementwise",
        differentiable=False,
    ),
    *define(
        """
        aten.add_.Tensor(self: tensor, other: operand, *, alpha: number = 1)
        aten.mul_.Tensor(self: tensor, other: operand)
        aten.copy_.default(self: tensor, src: tensor, non_blocking: bool = false)
        """,
        "elementwise",
        mutates=("self",),
        view="self",
        differentiable=False,
    ),
)
