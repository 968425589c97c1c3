"""Memory layouts that several operations share."""

from __future__ import annotations

from torch import Tensor


def empty_like_heads(x: Tensor) -> Tensor:
    """Returns an uninitialised tensor of x's shape (B, H, T, D), laid out (B, T, H, D): merging the heads is then a view."""
    batch, heads, tokens, head_dim = x.shape
    width = heads * head_dim
    return x.new_empty_strided((batch, heads, tokens, head_dim), (tokens * width, head_dim, width, 1))
