"""The parts of a GPT. Parameter names are those of Hugging Face's GPT-2, for Llama's choices too."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from gptkernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_varlen,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    rotary,
    softmax,
    swiglu,
)
from torch import Tensor, nn

from gptcore.config import GPTConfig


def backend(config: GPTConfig) -> str | None:
    """What to pass as a kernel's `backend`: "auto" leaves the choice to `gptkernels.use_backend`."""
    return None if config.kernels == "auto" else config.kernels


class KeyValueCache:
    """Keys and values of the tokens seen so far, so that a new token computes only its own.

    One pair of ``(B, kv heads, capacity, D)`` tensors a layer, made at the first append in the dtype that arrives.
    `length` is the number of tokens that every layer holds.

    Args:
        config: of the model.
        capacity: tokens it can hold at most; None for the model's context.
        padding: ``(B,)`` int64, how many of each sequence's first tokens are padding that nobody looks at.
    """

    def __init__(self, config: GPTConfig, capacity: int | None = None, padding: Tensor | None = None) -> None:
        self.capacity = config.context if capacity is None else min(capacity, config.context)
        self.padding = padding
        self.length = 0
        self.at: Tensor | None = None
        """``(1,)`` int64 on the model's device: where the next token goes, when that must not be a number of the
        host's (a CUDA graph repeats what it was captured with). All `capacity` keys are then handed out, and
        attention is told how many of them count."""
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * config.n_layer

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores ``(B, H, T, D)`` after the tokens seen so far; returns views of all of them, ``(B, H, length + T, D)``."""
        batch, heads, tokens, head_dim = key.shape
        held = self._layers[layer]
        if held is None:
            shape = batch, heads, self.capacity, head_dim
            held = self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        if held[0].shape[0] != batch:
            raise ValueError(f"tokens: got a batch of {batch}; accepted is the cache's, {held[0].shape[0]}")
        if self.at is not None:
            for store, new in zip(held, (key, value)):
                store.index_copy_(2, self.at, new)
            return held
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(
                f"tokens: got {tokens} after {self.length}; accepted is up to the cache's capacity, {self.capacity}"
            )
        for store, new in zip(held, (key, value)):
            store[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]


class Documents(NamedTuple):
    """Which tokens of a batch of packed sequences belong together: attention stays within a document."""

    cu_lengths: Tensor
    """``(documents + 1,)`` int32: where each begins in the flattened batch (B * T), and its end. None reaches over a row."""
    max_length: int
    """Tokens of the longest."""
    positions: Tensor
    """``(B, T)`` int64: each token's position in its document."""

    @classmethod
    def of(cls, tokens: Tensor, end_of_text: int) -> Documents:
        """Documents in ``(B, T)`` ids on the CPU: each ends with `end_of_text`, or where its row does."""
        batch, length = tokens.shape
        begins = torch.ones(batch, length, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == end_of_text
        starts = begins.flatten().nonzero().flatten()  # (documents,)
        bounds = torch.cat([starts, starts.new_tensor([batch * length])])
        lengths = bounds.diff()
        positions = torch.arange(batch * length) - starts.repeat_interleave(lengths)
        return cls(bounds.int(), int(lengths.max()), positions.view(batch, length))

    def to(self, device: torch.device) -> Documents:
        """The same with its tensors on `device`."""
        return Documents(self.cu_lengths.to(device), self.max_length, self.positions.to(device))


class Surroundings(NamedTuple):
    """What attention needs to know besides its input; the same for every layer."""

    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of each position's angles, ``(T, D / 2)`` or ``(B, T, D / 2)`` float32."""
    cache: KeyValueCache | None = None
    key_mask: Tensor | None = None
    """``(B, keys)`` bool, False on padding."""
    key_lengths: Tensor | None = None
    """``(B,)`` keys that count, where a cache hands out all of its capacity."""
    documents: Documents | None = None


NOWHERE = Surroundings()


def rotary_tables(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """``cos, sin`` of ``position * base^(-2i / D)``, each ``(*positions.shape, D / 2)`` float32.

    Source: Su et al., "RoFormer", arXiv 2104.09864; the stretching: Grattafiori et al., "The Llama 3 Herd of Models",
    arXiv 2407.21783, as its released configuration defines it.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rotary_base ** (-pairs / config.head_dim)  # (D / 2,), radians a token
    if (scaling := config.rotary_scaling) is not None:
        turns = scaling.original_context * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)  # 1: as it is, 0: stretched
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


class Norm(nn.Module):
    """The next step of the residual stream: a branch's output is added to it, and the sum is normalised."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.norm == "layer_norm" else None
        self.eps = config.eps
        self.backend = backend(config)

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(norm of the sum, the sum)``, both ``(B, T, C)``; the norm in the branch's dtype, the sum in the stream's."""
        if self.bias is None:
            if branch is None:
                return rms_norm(stream, self.weight, self.eps, backend=self.backend), stream
            return add_rms_norm(branch, stream, self.weight, self.eps, backend=self.backend)
        if branch is None:
            return layer_norm(stream, self.weight, self.bias, self.eps, backend=self.backend), stream
        return add_layer_norm(branch, stream, self.weight, self.bias, self.eps, backend=self.backend)


class Linear(nn.Linear):
    """`nn.Linear` on `gptkernels.linear`."""

    def __init__(self, config: GPTConfig, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=config.bias)
        self.backend = backend(config)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, backend=self.backend)


class SelfAttention(nn.Module):
    """Causal self-attention over the heads of one packed projection (queries, keys, values), read in place."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.explicit = config.attention_impl == "explicit"
        self.dropout = config.dropout
        self.backend = backend(config)
        self.c_attn = Linear(config, config.width, (self.n_head + 2 * self.kv_heads) * self.head_dim)
        self.c_proj = Linear(config, config.width, config.width)

    def forward(self, x: Tensor, around: Surroundings = NOWHERE) -> tuple[Tensor, Tensor | None]:
        """``(B, T, C) -> (B, T, C)``, and with explicit attention its weights ``(B, H, T, keys)``."""
        batch, tokens, width = x.shape
        heads = self.c_attn(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, D), a view
        turned, value = heads.split([self.n_head + self.kv_heads, self.kv_heads], dim=1)
        if around.rotary is not None:
            turned = rotary(turned, *around.rotary, backend=self.backend)
        query, key = turned.split([self.n_head, self.kv_heads], dim=1)
        if around.cache is not None:
            key, value = around.cache.append(self.layer, key, value)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if self.explicit:
            out, weights = self._explicit(query, key, value, around, dropout_p)
        elif around.documents is not None:
            bounds, longest = around.documents.cu_lengths, around.documents.max_length
            # (B * T, H, D): views where a sequence's tokens lie one behind the other, as they do in the projection.
            query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
            out = attention_varlen(
                query, key, value, bounds, bounds, longest, longest, is_causal=True, dropout_p=dropout_p, backend=self.backend
            )  # fmt: skip
            return self.c_proj(out.reshape(batch, tokens, width)), None
        else:
            # With key_lengths there is one query, the last: it may see every key that counts.
            out = attention(
                query, key, value, is_causal=around.key_lengths is None, dropout_p=dropout_p, key_mask=around.key_mask,
                key_lengths=around.key_lengths, backend=self.backend,
            )  # fmt: skip
        merged = out.transpose(1, 2).reshape(batch, tokens, width)  # a view: out lies (B, T, H, D) in memory
        return self.c_proj(merged), weights

    def _explicit(
        self, query: Tensor, key: Tensor, value: Tensor, around: Surroundings, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        group = self.n_head // self.kv_heads
        if group > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = query @ key.transpose(-2, -1)  # (B, H, T, keys)
        if around.key_mask is not None:
            scores = scores.masked_fill(~around.key_mask[:, None, None], -torch.inf)
        weights = softmax(scores, scale=1 / math.sqrt(self.head_dim), causal=True, backend=self.backend)
        return nn.functional.dropout(weights, dropout_p) @ value, weights


class MLP(nn.Module):
    """Linear, activation, linear. GELU adds the first bias in its own pass; SwiGLU's two halves are one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.c_fc = Linear(config, config.width, (2 if self.gated else 1) * config.hidden)  # rows: gate, then up
        self.c_proj = Linear(config, config.hidden, config.width)
        self.backend = backend(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.c_fc(x).chunk(2, dim=-1)  # views
            return self.c_proj(swiglu(gate, up, backend=self.backend))
        hidden = linear(x, self.c_fc.weight, backend=self.backend)
        return self.c_proj(gelu(hidden, self.c_fc.bias, backend=self.backend))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP. What it adds last is left to the next norm to add."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = Norm(config)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, stream: Tensor, branch: Tensor | None, around: Surroundings
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(stream, branch)``, each ``(B, T, C)``, to the same after this block, and with explicit attention its weights.

        The stream proper is the sum of the two.
        """
        normed, stream = self.ln_1(stream, branch)
        attended, weights = self.attn(normed, around)  # weights: (B, H, T, keys)
        normed, stream = self.ln_2(stream, self.dropout(attended))
        return stream, self.dropout(self.mlp(normed)), weights
