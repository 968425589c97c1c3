"""What each operation is compared with: PyTorch's fused op, and the same thing composed of elementary ones."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def _attention_composed(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **_: Any) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if is_causal:
        scores = scores.masked_fill(_future(scores), -math.inf)
    return scores.softmax(-1) @ value


def _pinned(backend: Any, spec: OpSpec) -> Contender:
    def attention(**kwargs: Any) -> Output:
        with torch.nn.attention.sdpa_kernel(backend):
            return spec.reference(**kwargs)

    return attention


def peers(spec: OpSpec, device: str, compiled: bool) -> dict[str, Contender]:
    """By name, what `spec`'s operation is compared with on `device`; with `compiled`, torch.compile's version as well.

    On a GPU attention's peer is each of SDPA's backends by itself: the default one is not always the fastest.
    """
    composed = {"layer_norm": _layer_norm_composed, "softmax": _softmax_composed, "attention": _attention_composed}
    fused = {"layer_norm": _layer_norm, "softmax": _softmax, "attention": spec.reference}
    # Where PyTorch has no fused op, the reference is what people write.
    found: dict[str, Contender] = {"eager": fused.get(spec.name, spec.reference)}
    if spec.name in composed:
        found["composed"] = composed[spec.name]
    if spec.name == "attention" and device == "cuda":
        kinds = torch.nn.attention.SDPBackend
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            found[f"sdpa {name.split('_')[0].lower()}"] = _pinned(getattr(kinds, name), spec)
    if compiled:
        found["compile"] = torch.compile(composed.get(spec.name, spec.reference))
    return found
