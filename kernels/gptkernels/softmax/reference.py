"""Softmax in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """``exp(scale * x) / sum(exp(scale * x))`` over `dim`, in x's dtype; a row of nothing but -inf gives zeros.

    `causal`: the last two dimensions are (query, key) and query i keeps keys up to ``i + keys - queries``.
    """
    if x.numel() == 0:
        return x.new_empty(x.shape) + 0.0 * x
    scores = x if scale == 1.0 else x * scale
    if causal:
        queries, keys = x.shape[-2:]
        future = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(keys - queries + 1)
        scores = scores.masked_fill(future, -math.inf)
    # A row without a finite score is NaN in softmax, and so is its gradient: compute it on zeros, then discard it.
    empty = scores.detach().amax(dim, keepdim=True) == -math.inf
    # dtype is given so that autocast does not widen the result.
    return torch.softmax(scores.masked_fill(empty, 0.0), dim, dtype=x.dtype).masked_fill(empty, 0.0)
