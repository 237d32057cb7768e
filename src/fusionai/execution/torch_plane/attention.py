"""`fusion.attention` in torch.

Shapes: B sequences, H query heads, G key/value heads (H a multiple of G), T tokens, D and E head sizes.
The kernels and the order of operations are the same as in transformers' attention, so that a captured model
trains bit for bit like the original.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTE: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    mask_TT: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale * query key^T + mask) value, (B, H, T, E), in the dtype of the arguments.

    `window` > 0 limits attention to that many tokens. `softcap` > 0 bounds the scores by softcap * tanh. `mask_TT`
    comes from `window_mask`, where `needs_mask` says that one is needed. `layer` names the layer's KV cache in
    decoding.
    """
    if softcap > 0:
        return _capped(query_BHTD, key_BGTD, value_BGTE, scale, softcap, mask_TT)
    heads, groups, tokens = query_BHTD.shape[1], key_BGTD.shape[1], query_BHTD.shape[2]
    grouped = heads != groups
    if grouped and (mask_TT is not None or not key_BGTD.shape[-1] == value_BGTE.shape[-1] <= 256):
        # The fused kernels share heads only without a mask and for equal head sizes up to 256.
        if tokens == 1:
            shape = (query_BHTD.shape[0], groups, heads // groups, query_BHTD.shape[-1])
            packed = functional.scaled_dot_product_attention(
                query_BHTD.reshape(shape), key_BGTD, value_BGTE, attn_mask=mask_TT, scale=scale
            )
            return packed.reshape(packed.shape[0], heads, 1, value_BGTE.shape[-1])
        key_BGTD, value_BGTE = _repeated(key_BGTD, heads), _repeated(value_BGTE, heads)
        grouped = False
    return functional.scaled_dot_product_attention(
        query_BHTD,
        key_BGTD,
        value_BGTE,
        attn_mask=mask_TT,
        is_causal=causal and mask_TT is None and tokens > 1,
        scale=scale,
        enable_gqa=grouped,
    )


def needs_mask(tokens: int, *, window: int, softcap: float, causal: bool) -> bool:
    """Return whether attention over `tokens` tokens needs a mask tensor. If not, the kernel's causal flag suffices."""
    if softcap > 0:
        return causal or window > 0
    return 0 < window <= tokens


def window_mask(tokens: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """Return who may attend to whom, as (1, 1, T, T) booleans.

    A causal window of w reaches back over w tokens, including the token itself. A window that is not causal reaches
    w tokens to each side. 0 means no window.
    """
    position_T = torch.arange(tokens, device=device)
    distance_TT = position_T[:, None] - position_T[None, :]
    if causal:
        allowed_TT = distance_TT >= 0
        if window > 0:
            allowed_TT &= distance_TT < window
    elif window > 0:
        allowed_TT = distance_TT.abs() <= window
    else:
        allowed_TT = torch.ones_like(distance_TT, dtype=torch.bool)
    return allowed_TT[None, None]


def _repeated(states_BGTD: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for the query heads that share it."""
    batch, groups, tokens, size = states_BGTD.shape
    if groups == heads:
        return states_BGTD
    shared = states_BGTD[:, :, None, :, :].expand(batch, groups, heads // groups, tokens, size)
    return shared.reshape(batch, heads, tokens, size)


def _capped(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTE: Tensor,
    scale: float,
    softcap: float,
    mask_TT: Tensor | None,
) -> Tensor:
    """Attention with bounded scores, for which there is no fused kernel."""
    heads = query_BHTD.shape[1]
    key_BHTD, value_BHTE = _repeated(key_BGTD, heads), _repeated(value_BGTE, heads)
    score_BHTT = torch.matmul(query_BHTD, key_BHTD.transpose(2, 3)) * scale
    score_BHTT = torch.tanh(score_BHTT / softcap) * softcap
    if mask_TT is not None:
        lowest = torch.finfo(score_BHTT.dtype).min
        score_BHTT = score_BHTT + torch.where(mask_TT, 0.0, lowest).to(score_BHTT.dtype)
    share_BHTT = functional.softmax(score_BHTT, dim=-1, dtype=torch.float32).to(query_BHTD.dtype)
    return torch.matmul(share_BHTT, value_BHTE)
