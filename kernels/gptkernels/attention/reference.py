"""Attention in plain PyTorch: `scaled_dot_product_attention` with this library's masks, or the formula step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.attention import dropout
from gptkernels.attention.options import Options

Attended = Tensor | tuple[Tensor, Tensor]
"""The output, or with `return_lse` ``(output, log-sum-exp)``."""


def visible_keys(query: Tensor, key: Tensor, options: Options) -> Tensor | None:
    """Which keys each query sees, bool, broadcastable to (B, H, Tq, Tk); None when every query sees every key."""
    queries, keys = query.shape[-2], key.shape[-2]
    visible, key_mask = None, options.key_mask
    if options.is_causal:  # bottom-right aligned: the last query sees every key
        visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if options.window is not None:
            visible = visible.triu(keys - queries - options.window + 1)
        visible = visible[None, None]  # (1, 1, Tq, Tk)
    if options.key_lengths is not None:
        inside = torch.arange(keys, device=key.device) < options.key_lengths[:, None]  # (B, Tk)
        key_mask = inside if key_mask is None else inside & key_mask
    if key_mask is not None:
        key_mask = key_mask[:, None, None, :]  # (B, 1, 1, Tk)
        visible = key_mask if visible is None else visible & key_mask
    return visible


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float, kept: Tensor | None, rescale: float
) -> tuple[Tensor, Tensor]:
    """Returns ``dropout(softmax(scores)) @ value``, computed step by step, and the log-sum-exp."""
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query * scale) @ key.transpose(-2, -1)  # (B, H, Tq, Tk)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    sees_any = torch.ones((), dtype=torch.bool, device=query.device)
    if visible is not None:
        sees_any = visible.any(dim=-1, keepdim=True)
        # Softmax and its gradients are NaN for a fully masked row: let it see every key, then set it to 0.
        wide = wide.masked_fill(~(visible | ~sees_any), -math.inf)
    if key.shape[2] == 0:
        sees_any = torch.zeros_like(sees_any)
    weights = wide.softmax(-1)
    if kept is not None:
        weights = torch.where(kept, weights * rescale, 0.0)
    out = (weights.to(query.dtype) @ value).masked_fill(~sees_any, 0.0)
    lse = wide.logsumexp(-1).masked_fill(~sees_any.squeeze(-1), -math.inf)
    return out, lse


def attention(query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool = False, **options: Any) -> Attended:
    """``softmax(query @ key^T * scale, over visible keys) @ value``; a query that sees no key gives zeros.

    `options` are those of `gptkernels.attention`; where there is dropout, seeds must be among them.
    """
    return attend(query, key, value, Options(**options), return_lse)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Attended:
    """`attention` of every sequence of a packed batch by itself, as one attention with a block-diagonal mask."""
    packed = Options(
        cu_queries=cu_seqlens_q, cu_keys=cu_seqlens_k, max_queries=max_seqlen_q, max_keys=max_seqlen_k, **options
    )
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, H, total, D)
    attended = attend(query, key, value, packed, return_lse)
    if isinstance(attended, tuple):
        return attended[0][0].transpose(0, 1), attended[1][0]
    return attended[0].transpose(0, 1)


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options, return_lse: bool = False) -> Attended:
    """`attention` of query (B, H, Tq, D), key and value (B, Hkv, Tk, D): a padded batch, or a packed one of B = 1."""
    is_causal, scale = options.is_causal, options.scale
    visible, kept = None, None
    if options.cu_queries is not None:
        is_causal = False
        visible, kept = _packed_masks(query, key, options)
    else:
        if options.dropout_p > 0.0:
            assert options.dropout_seed is not None
            kept = dropout.attention_dropout_mask(
                options.dropout_seed, query.shape[1], query.shape[2], key.shape[2], options.dropout_p
            )  # (B, H, Tq, Tk)
        masked = options.key_lengths is not None or options.key_mask is not None or options.window is not None
        # PyTorch aligns its causal mask top-left. For equal lengths that is the bottom-right one: leave it to PyTorch, whose
        # fused kernels then run.
        if masked or return_lse or kept is not None or (is_causal and query.shape[-2] != key.shape[-2]):
            visible = visible_keys(query, key, options)
            is_causal = False
    if kept is not None or return_lse:
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        out, lse = _explicit(query, key, value, visible, scale, kept, dropout.rescale(options.dropout_p))
        return (out, lse) if return_lse else out
    # Branch on the comparison: with dynamic sizes under torch.compile its result is a symbol, which SDPA does not accept.
    grouped: Any = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    if visible is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, **grouped)
    sees_any = visible.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(  # as in `_explicit`: rows without a key see every key, then are set to 0
        query, key, value, attn_mask=visible | ~sees_any, scale=scale, **grouped
    )
    return out.masked_fill(~sees_any, 0.0)


def _packed_masks(query: Tensor, key: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """Returns which keys each query of a packed batch sees, (1, 1, total_q, total_k), and which weights dropout keeps."""
    assert options.cu_queries is not None
    assert options.cu_keys is not None

    def place(cumulative: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns each token's sequence, its position there, and that sequence's length."""
        cumulative = cumulative.long()
        token = torch.arange(tokens, device=cumulative.device)
        sequence = torch.searchsorted(cumulative[1:], token, right=True)
        return sequence, token - cumulative[sequence], (cumulative[1:] - cumulative[:-1])[sequence]

    sequence_q, at_q, length_q = (x[:, None] for x in place(options.cu_queries, query.shape[2]))  # (total_q, 1)
    sequence_k, at_k, length_k = place(options.cu_keys, key.shape[2])  # (total_k,)
    visible = sequence_q == sequence_k  # (total_q, total_k)
    if options.is_causal:
        ahead = at_k - (at_q + length_k - length_q)  # 0 at the query's own position, aligned bottom-right
        visible = visible & (ahead <= 0)
        if options.window is not None:
            visible = visible & (ahead > -options.window)
    kept = None
    if options.dropout_p > 0.0:
        assert options.dropout_seed is not None
        head = torch.arange(query.shape[1], device=query.device)[:, None, None]
        seed = options.dropout_seed[sequence_q]
        kept = dropout.kept(seed, head, at_q, at_k, options.dropout_p)[None]  # (1, H, total_q, total_k)
    return visible[None, None], kept
