"""Attention: the public functions, their checks and their autograd.Function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptkernels import _check, _library
from gptkernels import backend as _backend
from gptkernels.attention import reference

MAX_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``softmax(query @ key^T * scale) @ value`` over the keys each query may see, in memory linear in the tokens.

    Slices of a packed projection are read in place; the output is laid out ``(B, Tq, H, D)`` in memory, so that
    ``out.transpose(1, 2).reshape(B, Tq, H * D)`` costs nothing. Softmax runs in float32; the backward is
    deterministic. Under autocast, inputs are cast to autocast's dtype as PyTorch's own attention does.

    Args:
        query: ``(B, H, Tq, D)``, D at most 256.
        key, value: ``(B, Hkv, Tk, D)``; Hkv divides H (fewer means grouped-query attention: query head h reads
            key/value head ``h // (H / Hkv)``).
        is_causal: query i sees keys up to ``i + Tk - Tq``: aligned bottom-right, the last query sees every key.
        scale: positive; None for ``1 / sqrt(D)``.
        dropout_p: must be 0.0 in this version.
        key_lengths: ``(B,)`` integers: sequence b sees only its first ``key_lengths[b]`` keys (right padding), and
            the work on the others is skipped. Causal alignment stays that of the padded tensors.
        key_mask: ``(B, Tk)`` bool, True = attend; serves left padding.
        window: must be None in this version.
        backend: overrides `use_backend` for this call.

    Returns:
        ``(B, H, Tq, D)`` in query's dtype. A query that sees no key gets zeros.

    Raises:
        ValueError: a shape, head count, scale or option that is not accepted, or tensors on different devices.
        TypeError: tensors that are not floating point or of different dtypes.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Dao, "FlashAttention-2", arXiv 2307.08691; Milakov and Gimelshein, "Online normalizer calculation for
    softmax", arXiv 1805.02867. The derivation is in ``MATH.md``.
    """
    _validate(query, key, value, key_lengths, key_mask)
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: got {dropout_p}; accepted is 0.0 (this version has no attention dropout)")
    if window is not None:
        raise ValueError(f"window: got {window}; accepted is None (this version has no sliding window)")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    elif not 0.0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}; accepted are positive finite numbers, or None for 1 / sqrt(head_dim)")
    if (dtype := _check.autocast_dtype(query)) is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check.same_dtype("key", key, "query", query)
    _check.same_dtype("value", value, "query", query)
    name = _backend.choose("attention", query, backend)
    if name == "reference":
        return reference.attention(
            query, key, value, is_causal=is_causal, scale=scale, key_lengths=key_lengths, key_mask=key_mask
        )
    return _library.apply(AttentionFunction, query, key, value, key_lengths, key_mask, is_causal, scale, name)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """`attention` with ``is_causal=True``: a GPT's self-attention."""
    return attention(query, key, value, is_causal=True, **kwargs)


def _validate(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check.floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted is (batch, heads, tokens, head_dim)")
        _check.same_device(name, x, "query", query)
    batch, heads, _, head_dim = query.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"query: got head_dim {head_dim}; accepted is at most {MAX_HEAD_DIM}")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key: got shape {tuple(key.shape)}; accepted is (batch {batch}, heads, tokens, head_dim {head_dim})"
        )
    _check.shape("value", value, tuple(key.shape))
    kv_heads = key.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: got {kv_heads} heads; accepted are counts that divide query's {heads}")
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths: got dtype {key_lengths.dtype}; accepted are int32 and int64")
        _check.shape("key_lengths", key_lengths, (batch,))
        _check.same_device("key_lengths", key_lengths, "query", query)
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: got dtype {key_mask.dtype}; accepted is bool (True = attend)")
        _check.shape("key_mask", key_mask, (batch, key.shape[2]))
        _check.same_device("key_mask", key_mask, "query", query)


class AttentionFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves inputs, output and each row's float32 log-sum-exp, in the backend's base."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor | None,
        key_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        backend: str,
    ) -> Tensor:
        out, lse = _library.ops(backend).attention_forward(query, key, value, key_lengths, key_mask, is_causal, scale)
        ctx.save_for_backward(query, key, value, out, lse, key_lengths, key_mask)
        ctx.is_causal, ctx.scale, ctx.backend = is_causal, scale, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, key_lengths, key_mask = ctx.saved_tensors
        grads = _library.ops(ctx.backend).attention_backward(
            grad_out, query, key, value, out, lse, key_lengths, key_mask, ctx.is_causal, ctx.scale
        )
        return (*grads, None, None, None, None, None)


def empty_like_heads(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape (B, H, T, D), laid out (B, T, H, D): merging the heads again is then a view."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return empty_like_heads(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_heads(query), empty_like_heads(key), empty_like_heads(value)


_library.register(
    "attention_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? key_mask, bool is_causal, float scale)"
    " -> (Tensor out, Tensor lse)",
    fake=_fake_forward,
    module="gptkernels.attention.triton",
)
_library.register(
    "attention_backward",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? key_lengths,"
    " Tensor? key_mask, bool is_causal, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    fake=_fake_backward,
    module="gptkernels.attention.triton",
)
