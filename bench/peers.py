"""What each operation is compared with: PyTorch's own op, the same composed of elementary ops, and other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from gptkernels._spec import OpSpec, Output
from torch import Tensor

Contender = Callable[..., Output]


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _layer_norm_composed(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(x.dtype)


def _future(scores: Tensor) -> Tensor:
    """True where a key comes after its query, (queries, keys)."""
    queries, keys = scores.shape[-2:]
    return torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)


def _softmax(x: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    scores = x * scale if scale != 1.0 else x
    if causal:
        scores = scores.masked_fill(_future(x), -math.inf)
    return F.softmax(scores, dim)


def _softmax_composed(x: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    scores = x.float() * scale if x.dtype in (torch.bfloat16, torch.float16) else x * scale
    if causal:
        scores = scores.masked_fill(_future(x), -math.inf)
    exponentials = (scores - scores.amax(dim, keepdim=True)).exp()
    return (exponentials / exponentials.sum(dim, keepdim=True)).to(x.dtype)


def _attention_composed(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None, **_: Any
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(_future(scores), -math.inf)
    return scores.softmax(-1) @ value


def _pinned(backend: Any, spec: OpSpec) -> Contender:
    def attention(**kwargs: Any) -> Output:
        with torch.nn.attention.sdpa_kernel(backend):
            return spec.reference(**kwargs)

    return attention


def flex_attention(compiled: bool) -> Contender:
    """FlexAttention with this library's causal mask and window; with `compiled`, compiled for each shape, as PyTorch advises."""
    from torch.nn.attention import flex_attention as flex

    function = torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention

    @cache
    def block_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Any:
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query + (keys - queries) - key  # 0 for the query's own key
            return (distance >= 0) if window is None else (distance >= 0) & (distance < window)

        return flex.create_block_mask(visible, None, None, queries, keys, device=device)

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
        **_: Any,
    ) -> Any:
        mask = block_mask(query.shape[2], key.shape[2], window, query.device) if is_causal else None
        grouped = query.shape[1] != key.shape[1]
        return function(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)

    return attention


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    **_: Any,
) -> Any:
    from torch.nn.attention import varlen

    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    try:
        return varlen.varlen_attn(query, key, value, *lengths, window_size=(-1, 0 if is_causal else -1))
    except TypeError:  # PyTorch 2.10's signature
        return varlen.varlen_attn(query, key, value, *lengths, is_causal)  # type: ignore[call-arg]


def liger(spec: OpSpec) -> Contender | None:
    """Liger-Kernel's function for `spec`'s operation; None if it has none or is not installed."""
    try:
        from liger_kernel.transformers import functional  # type: ignore[import-not-found]
    except ImportError:
        return None
    return {
        "layer_norm": lambda x, weight, bias: functional.liger_layer_norm(x, weight, bias, 1e-5),
        # Its default works in place, and would change x for the other contenders.
        "rms_norm": lambda x, weight: functional.liger_rms_norm(x, weight, 1e-6, in_place=False),
        "swiglu": lambda gate, up: functional.liger_swiglu(gate, up),
        "cross_entropy": lambda logits, target, reduction: functional.liger_cross_entropy(
            logits.clone(), target, reduction=reduction
        ),
        "linear_cross_entropy": lambda x, weight, target, bias, reduction: functional.liger_fused_linear_cross_entropy(
            x, weight, target, bias, reduction=reduction
        ),
    }.get(spec.name)  # fmt: skip


def peers(spec: OpSpec, device: str, compiled: bool) -> dict[str, Contender]:
    """The functions, by name, that `spec`'s operation is compared with on `device`; with `compiled` also torch.compile's.

    On a GPU, attention is compared with each of SDPA's backends (the default is not always the fastest) and FlexAttention,
    packed attention with `torch.nn.attention.varlen`, and all operations with Liger-Kernel's where it is installed.
    """
    composed = {"layer_norm": _layer_norm_composed, "softmax": _softmax_composed, "attention": _attention_composed}
    fused = {"layer_norm": _layer_norm, "softmax": _softmax, "attention": spec.reference}
    # Without an op of PyTorch's, "eager" is the reference: what people write in its place.
    found: dict[str, Contender] = {"eager": fused.get(spec.name, spec.reference)}
    if spec.name in composed:
        found["composed"] = composed[spec.name]
    if spec.name == "attention" and device == "cuda":
        kinds = torch.nn.attention.SDPBackend
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            found[f"sdpa {name.split('_')[0].lower()}"] = _pinned(getattr(kinds, name), spec)
        found["flex"] = flex_attention(compiled)
    if spec.name == "attention_varlen" and device == "cuda":
        found["varlen_attn"] = _packed_attention
    if compiled:
        found["compile"] = torch.compile(composed.get(spec.name, spec.reference), dynamic=False)
    if device == "cuda" and (other := liger(spec)) is not None:
        # Its cross-entropy overwrites the logits with their gradient: each call needs a copy of them.
        found["liger, with a copy" if spec.name == "cross_entropy" else "liger"] = other
    return found
