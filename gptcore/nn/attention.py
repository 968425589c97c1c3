"""Attention of every model: self-attention, causal or not, over one packed projection of queries, keys and values."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from gptkernels import attention, attention_varlen, rotary, softmax
from torch import Tensor, nn

from gptcore.nn.cache import KeyValueCache
from gptcore.nn.documents import Documents
from gptcore.nn.linear import Linear

AttentionImpl = Literal["fused", "explicit"]


class AttentionArgs(NamedTuple):
    """What every layer's attention is given besides its input; the same for all layers."""

    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of each position's angles, ``(T, D / 2)`` or ``(B, T, D / 2)`` float32."""
    cache: KeyValueCache | None = None
    key_mask: Tensor | None = None
    """``(B, keys)`` bool, False on padding."""
    key_lengths: Tensor | None = None
    """``(B,)`` number of keys that count: the rest is padding, or a cache's room for tokens to come."""
    documents: Documents | None = None


class SelfAttention(nn.Module):
    """Self-attention over the heads of one packed projection (queries, keys, values), read in place.

    Args:
        width: features of a token before and after.
        n_head: query heads; divides width.
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head query heads; None: n_head.
        causal: whether a token attends to itself and earlier tokens alone.
        layer: which of the cache's layers is this one's.
        implementation: "fused", one kernel, or "explicit", ``softmax(QK^T)V`` step by step, which returns the weights.
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

    def forward(self, x: Tensor, given: AttentionArgs | None = None) -> tuple[Tensor, Tensor | None]:
        """``(B, T, C) -> (B, T, C)``, and with explicit attention its weights ``(B, H, T, keys)``."""
        given = given or AttentionArgs()
        batch, tokens, width = x.shape
        heads = self.c_attn(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, D), a view
        turned, value = heads.split([self.n_head + self.kv_heads, self.kv_heads], dim=1)
        if given.rotary is not None:
            turned = rotary(turned, *given.rotary, backend=self.backend)
        query, key = turned.split([self.n_head, self.kv_heads], dim=1)
        if given.cache is not None:
            key, value = given.cache.append(self.layer, key, value)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if self.explicit:
            out, weights = self._explicit(query, key, value, given, dropout_p)
        elif given.documents is not None:
            bounds, longest = given.documents.cu_lengths, given.documents.max_length
            # (B * T, H, D): views where a sequence's tokens lie one behind the other, as they do in the projection.
            query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
            out = attention_varlen(
                query, key, value, bounds, bounds, longest, longest, is_causal=self.causal, dropout_p=dropout_p,
                backend=self.backend,
            )  # fmt: skip
            return self.c_proj(out.reshape(batch, tokens, width)), None
        else:
            out = attention(
                query, key, value, is_causal=self._is_causal(given), dropout_p=dropout_p, key_mask=given.key_mask,
                key_lengths=given.key_lengths, backend=self.backend,
            )  # fmt: skip
        merged = out.transpose(1, 2).reshape(batch, tokens, width)  # a view: out lies (B, T, H, D) in memory
        return self.c_proj(merged), weights

    def _is_causal(self, given: AttentionArgs) -> bool:
        # A causal model is given key_lengths with one query, the last token: it attends to every key that counts.
        return self.causal and given.key_lengths is None

    def _explicit(
        self, query: Tensor, key: Tensor, value: Tensor, given: AttentionArgs, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        group = self.n_head // self.kv_heads
        if group > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = query @ key.transpose(-2, -1)  # (B, H, T, keys)
        if given.key_mask is not None:
            scores = scores.masked_fill(~given.key_mask[:, None, None], -torch.inf)
        if given.key_lengths is not None:
            outside = torch.arange(key.shape[2], device=key.device) >= given.key_lengths[:, None]  # (B, keys)
            scores = scores.masked_fill(outside[:, None, None], -torch.inf)
        weights = softmax(
            scores, scale=1 / math.sqrt(self.head_dim), causal=self._is_causal(given), backend=self.backend
        )
        return nn.functional.dropout(weights, dropout_p) @ value, weights
