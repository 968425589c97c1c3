"""Our entry in transformers' `AttentionInterface`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.output_capturing import _active_collector

from gptkernels import attention
from gptkernels.attention.api import MAX_HEAD_DIM
from gptkernels.integrations.transformers.masks import Visible


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Our entry in transformers' `AttentionInterface`: ``(B, H, T, D)`` to ``(B, T, H, D)`` and the weights, if wanted.

    What our kernels do not do goes where it is done exactly: wanted attention weights, capped scores, sinks and position
    biases to the model's own eager attention; masks that are no `Visible`, and sizes beyond the kernels', to PyTorch's.
    """
    visible = _as_visible(module, query, key, attention_mask, is_causal)
    if visible is None and attention_mask is None:  # causal, and more queries than keys: PyTorch aligns at the first
        shape = query.shape[2], key.shape[2]
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    if _wants_weights(kwargs) or any(kwargs.get(name) is not None for name in _SCORES):
        mask = attention_mask if visible is None else visible.dense(query.device)
        return _eager(module, query, key, value, mask, dropout, scaling, kwargs)
    if visible is None or not _fits(query, key, value, scaling) or kwargs.get("cache") is not None:
        if isinstance(attention_mask, Visible):
            attention_mask = attention_mask.dense(query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if visible.keys < visible.slots:
        key, value = key[:, :, : visible.keys], value[:, :, : visible.keys]
    out = attention(
        query,
        key,
        value,
        is_causal=visible.is_causal,
        scale=scaling,
        dropout_p=dropout,
        key_mask=visible.key_mask,
        window=visible.window,
    )
    return out.transpose(1, 2), None  # (B, T, H, D), as it lies in memory


_SCORES = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Arguments by which a model changes its scores."""


def _as_visible(module: nn.Module, query: Tensor, key: Tensor, mask: Any, is_causal: bool | None) -> Visible | None:
    """What a mask, or none, says for these queries and keys; None for a mask that only says it key by key."""
    queries, slots = query.shape[2], key.shape[2]
    if isinstance(mask, Visible):
        if (mask.queries, mask.slots) != (queries, slots):
            raise ValueError(
                f"attention_mask: made for {mask.queries} queries and {mask.slots} keys; got {queries} and {slots}"
            )
        return mask
    if mask is None:  # by the same convention as for "sdpa": the layer knows, and an empty cache's places lie behind
        causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if not causal:
            return Visible(queries, slots, slots, False, None, None)
        return Visible(queries, slots, queries, True, None, None) if slots >= queries else None
    if queries == 1 and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:] == (1, 1, slots):
        return Visible(1, slots, slots, False, None, mask[:, 0, 0].expand(query.shape[0], -1))
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> bool:
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    return (
        head_dim <= MAX_HEAD_DIM
        and key.shape == value.shape
        and key.shape[0] == query.shape[0]
        and key.shape[3] == head_dim
        and heads % kv_heads == 0
        and (scaling is None or scaling > 0.0)
    )


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the caller of the model asked for attention weights: some models pass it on, for others hooks collect them."""
    collected = (_active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()) or ()
    return bool(kwargs.get("output_attentions")) or "attentions" in collected or "cross_attentions" in collected


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model's own file defines; it takes additive masks."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__}: attention weights, softcap, sinks or a position bias were asked for, which "
            'attn_implementation="gptkernels" leaves to the model\'s own eager attention, and it has none'
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
