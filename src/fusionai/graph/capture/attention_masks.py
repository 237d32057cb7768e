"""Reads, from the mask function of a transformers model, which kind of attention the model asks for.

`fusion.attention` can express causal, sliding-window and full attention without a mask tensor. A model with any other
mask is refused; its mask is never dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import masking_utils

from fusionai.errors import GraphError


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """Stands in for a mask tensor while a model is traced."""

    causal: bool
    window: int
    """Window as `fusion.attention` counts it: causal windows include the position itself, others reach to each side;
    0 means no window."""


def attention_kind(*, mask_function: Callable[..., Any], attention_mask: Any = None, **_: Any) -> AttentionKind:
    """Answer transformers' request for a mask (an entry of its AttentionMaskInterface)."""
    if attention_mask is not None:
        raise GraphError("the model gets a padding mask; training packs its sequences, so leave attention_mask out")
    causal, windows = False, set()
    for name, cells in _parts(mask_function):
        if name == "causal_mask_function":
            causal = True
        elif name in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
            windows.add(int(cells["sliding_window"]))
        elif name == "packed_sequence_mask_function":
            _refuse_divided(cells["packed_sequence_mask"])
        elif name != "bidirectional_mask_function":
            raise GraphError(
                f"the model's attention uses the mask {name!r}, which fusion.attention cannot express; "
                "set its attention implementation to 'sdpa' and capture it with capture()"
            )
    return AttentionKind(causal, min(windows, default=0))


def _refuse_divided(sequences: Tensor) -> None:
    """Refuse sequences that positions divide. A trace asks for such a mask always, because it knows no values.

    Where the values are known (see `own_positions`), the mask asks for the division only if there is one.
    """
    if not isinstance(sequences, FakeTensor) and not sequences.is_meta and bool((sequences != 0).any()):
        raise GraphError(
            "the model divides its sequences wherever its positions do not rise by one, such as at padding, which "
            "fusion.attention cannot express; set its attention implementation to 'sdpa' and capture it with capture()"
        )


def _parts(function: Callable[..., Any]) -> list[tuple[str, dict[str, Any]]]:
    """Take a mask function apart into the plain ones it combines: (name, what each has closed over)."""
    name = function.__qualname__.split(".<locals>")[0]
    code, closure = function.__code__, function.__closure__ or ()
    cells = {cell: value.cell_contents for cell, value in zip(code.co_freevars, closure, strict=True)}
    known = function.__module__ == masking_utils.__name__
    if known and name == "and_masks":
        return [part for each in cells["mask_functions"] for part in _parts(each)]
    if known and name in ("remap_positions_for_packed_sequence", "add_offsets_to_mask_function"):
        return _parts(cells["mask_function"])
    return [(name if known else f"{function.__module__}.{function.__qualname__}", cells)]
