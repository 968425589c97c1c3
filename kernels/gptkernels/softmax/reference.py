"""Softmax in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """``exp(scale * x) / sum(exp(scale * x))`` over `dim`, in x's dtype; a row of nothing but -inf becomes zeros.

    `causal`: the last two dimensions are (query, key) and query i keeps keys up to ``i + keys - queries``.
    """
    if x.numel() == 0:
        return x.new_empty(x.shape) + 0.0 * x
    # Scale in float32: a scaled float16 may overflow.
    scores = x if scale == 1.0 else x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if causal:
        queries, keys = x.shape[-2:]
        future = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(keys - queries + 1)
        scores = scores.masked_fill(future, -math.inf)
    # Softmax and its gradient are NaN for a row without a finite score: compute it on zeros, then set it to 0.
    empty = scores.detach().amax(dim, keepdim=True) == -math.inf
    # The dtype is given so that autocast does not widen the result.
    return torch.softmax(scores.masked_fill(empty, 0.0), dim, dtype=scores.dtype).to(x.dtype).masked_fill(empty, 0.0)


def softmax_backward(grad_out: Tensor, out: Tensor, dim: int, scale: float) -> Tensor:
    """Returns the gradient of x from the output: ``scale * out * (g - mean of g)``, in float32 or wider, rounded once.

    The mean is weighted by the output, which sums to 1 up to rounding. The output is 0 where `causal` excludes a key.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    y, g = out.to(wide), grad_out.to(wide)
    total = y.sum(dim, keepdim=True).clamp_min(torch.finfo(wide).tiny)  # a row without a finite score sums to 0
    return (scale * y * (g - (y * g).sum(dim, keepdim=True) / total)).to(out.dtype)
