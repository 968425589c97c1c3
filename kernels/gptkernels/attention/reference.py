"""Attention in plain PyTorch: `scaled_dot_product_attention` with this library's masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_keys(
    query: Tensor, key: Tensor, is_causal: bool, key_lengths: Tensor | None, key_mask: Tensor | None
) -> Tensor | None:
    """Which keys each query sees, bool, broadcastable to (B, H, Tq, Tk); None when every query sees every key."""
    queries, keys = query.shape[-2], key.shape[-2]
    visible = None
    if is_causal:  # bottom-right aligned: the last query sees every key
        visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        visible = visible[None, None]  # (1, 1, Tq, Tk)
    if key_lengths is not None:
        inside = torch.arange(keys, device=key.device) < key_lengths[:, None]  # (B, Tk)
        key_mask = inside if key_mask is None else inside & key_mask
    if key_mask is not None:
        key_mask = key_mask[:, None, None, :]  # (B, 1, 1, Tk)
        visible = key_mask if visible is None else visible & key_mask
    return visible


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """``softmax(query @ key^T * scale, over visible keys) @ value``; a query that sees no key gives zeros."""
    grouped = query.shape[1] != key.shape[1]
    masked = key_lengths is not None or key_mask is not None
    if not masked and (not is_causal or query.shape[-2] == key.shape[-2]):
        # Equal lengths: PyTorch's top-left causal mask is the bottom-right one, and its fused kernels apply.
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    visible = visible_keys(query, key, is_causal, key_lengths, key_mask)
    assert visible is not None
    sees_any = visible.any(dim=-1, keepdim=True)
    # A fully masked row is NaN in softmax, and so are its gradients: let it see everything, then discard it.
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible | ~sees_any, scale=scale, enable_gqa=grouped
    )
    return out.masked_fill(~sees_any, 0.0)
