"""Attention of every model: self-attention, causal or not, and cross-attention from one sequence to another."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from gptkernels import attention, attention_varlen, rotary, softmax
from torch import Tensor, nn

from gptcore.nn.cache import KeyValueCache
from gptcore.nn.documents import Documents
from gptcore.nn.linear import Linear

AttentionImpl = Literal["fused", "explicit"]


class AttentionArgs(NamedTuple):
    """What attention takes besides its input; the same for every layer."""

    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of each position's angles, ``(T, D / 2)`` or ``(B, T, D / 2)`` float32."""
    cache: KeyValueCache | None = None
    key_mask: Tensor | None = None
    """``(B, keys)`` bool, False on padding."""
    key_lengths: Tensor | None = None
    """``(B,)`` keys to attend to, from the first on; the others are padding, or room in the cache for later tokens."""
    documents: Documents | None = None


class SelfAttention(nn.Module):
    """Self-attention. One linear layer projects to queries, keys and values; attention reads its output in place.

    Args:
        width: features of a token before and after.
        n_head: query heads; divides width.
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head query heads; None: n_head.
        causal: whether a token attends only to itself and earlier tokens.
        layer: index of this layer in the cache.
        implementation: "fused", one kernel, or "explicit", ``softmax(QK^T)V`` step by step, which also returns the weights.
        dropout: probability of dropping an attention weight in training.
        bias: whether the linear layers add a bias.
        backend: a `gptkernels` backend; None leaves the choice to `gptkernels.use_backend`.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        n_kv_head: int | None = None,
        *,
        causal: bool,
        layer: int = 0,
        implementation: AttentionImpl = "fused",
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.n_head, self.head_dim = n_head, width // n_head
        self.kv_heads = n_head if n_kv_head is None else n_kv_head
        self.causal, self.layer, self.dropout, self.backend = causal, layer, dropout, backend
        self.explicit = implementation == "explicit"
        self.c_attn = Linear(width, (n_head + 2 * self.kv_heads) * self.head_dim, bias=bias, backend=backend)
        self.c_proj = Linear(width, width, bias=bias, backend=backend)

    def forward(self, x: Tensor, args: AttentionArgs | None = None) -> tuple[Tensor, Tensor | None]:
        """``(B, T, C) -> (B, T, C)``, and with explicit attention its weights ``(B, H, T, keys)``."""
        args = args or AttentionArgs()
        batch, tokens, width = x.shape
        heads = self.c_attn(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, D), a view
        query_key, value = heads.split([self.n_head + self.kv_heads, self.kv_heads], dim=1)
        if args.rotary is not None:
            query_key = rotary(query_key, *args.rotary, backend=self.backend)
        query, key = query_key.split([self.n_head, self.kv_heads], dim=1)
        if args.cache is not None:
            key, value = args.cache.append(self.layer, key, value)
        options: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0, "backend": self.backend}
        if args.documents is not None and not self.explicit:
            bounds, longest = args.documents.cu_lengths, args.documents.max_length
            # (B * T, H, D), views: in the projection a sequence's tokens are contiguous.
            query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
            out = attention_varlen(
                query, key, value, bounds, bounds, longest, longest, is_causal=self.causal, **options
            )
            return self.c_proj(out.reshape(batch, tokens, width)), None
        # One query with key_lengths is the next token of a cache with room for later ones: it attends to every key.
        options |= {"is_causal": self.causal and (args.key_lengths is None or tokens > 1)}
        options |= {"key_mask": args.key_mask, "key_lengths": args.key_lengths}
        out, weights = _attend(self.explicit, query, key, value, **options)
        merged = out.transpose(1, 2).reshape(batch, tokens, width)  # a view: out lies (B, T, H, D) in memory
        return self.c_proj(merged), weights


class CrossAttention(nn.Module):
    """Attention from one sequence to another: queries from `x`, keys and values from `source`, such as an encoder's output.

    Args:
        width: features of a token, in both sequences.
        n_head: heads; divides width.
        layer, implementation, dropout, bias, backend: see `SelfAttention`.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        *,
        layer: int = 0,
        implementation: AttentionImpl = "fused",
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.n_head, self.head_dim = n_head, width // n_head
        self.layer, self.dropout, self.backend = layer, dropout, backend
        self.explicit = implementation == "explicit"
        self.q_attn = Linear(width, width, bias=bias, backend=backend)
        self.c_attn = Linear(width, 2 * width, bias=bias, backend=backend)  # keys, then values
        self.c_proj = Linear(width, width, bias=bias, backend=backend)

    def forward(
        self, x: Tensor, source: Tensor, key_lengths: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``(B, T, C) -> (B, T, C)``, and with explicit attention its weights ``(B, H, T, S)``.

        Args:
            x: what attends, ``(B, T, C)``.
            source: what is attended to, ``(B, S, C)``; with a `cache` it is read at the first call only.
            key_lengths: ``(B,)`` how many tokens of each source are not padding, which is on the right; None: all.
            cache: keeps the keys and values of `source` for the next calls.
        """
        batch, tokens, width = x.shape
        query = self.q_attn(x).view(batch, tokens, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D), a view
        keys_values = None if cache is None else cache.source.get(self.layer)
        if keys_values is None:
            packed = self.c_attn(source).view(source.shape[0], source.shape[1], -1, self.head_dim).transpose(1, 2)
            keys_values = packed.split(self.n_head, dim=1)  # two views (B, H, S, D)
            if cache is not None:
                cache.source[self.layer] = keys_values
        key, value = keys_values
        dropout_p = self.dropout if self.training else 0.0
        out, weights = _attend(
            self.explicit, query, key, value, key_lengths=key_lengths, dropout_p=dropout_p, backend=self.backend
        )
        return self.c_proj(out.transpose(1, 2).reshape(batch, tokens, width)), weights


def _attend(explicit: bool, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Attention in one kernel, or step by step, which also returns the weights."""
    if explicit:
        return explicit_attention(query, key, value, **options)
    return attention(query, key, value, **options), None


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`gptkernels.attention` step by step: the output and the weights ``(B, H, T, keys)``, before dropout."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-2, -1)  # (B, H, T, keys)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    if key_lengths is not None:
        padding = torch.arange(key.shape[2], device=key.device) >= key_lengths[:, None]  # (B, keys)
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    weights = softmax(scores, scale=1 / math.sqrt(query.shape[-1]), causal=is_causal, backend=backend)
    return nn.functional.dropout(weights, dropout_p) @ value, weights
