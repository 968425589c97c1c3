"""The parts of a GPT. Parameter names are those of Hugging Face's GPT-2."""

from __future__ import annotations

import math

import torch
from gptkernels import add_layer_norm, causal_attention, gelu, layer_norm, linear, softmax
from torch import Tensor, nn

from gptcore.config import GPTConfig


def backend(config: GPTConfig) -> str | None:
    """What to pass as a kernel's `backend`: "auto" leaves the choice to `gptkernels.use_backend`."""
    return None if config.kernels == "auto" else config.kernels


class KeyValueCache:
    """Keys and values of the tokens seen so far, so that a new token computes only its own.

    One pair of ``(B, H, context, D)`` tensors a layer, made at the first append in the dtype that arrives.
    `length` is the number of tokens that every layer holds.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.context = config.context
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * config.n_layer

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores ``(B, H, T, D)`` after the tokens seen so far; returns views of all of them, ``(B, H, length + T, D)``."""
        batch, heads, tokens, head_dim = key.shape
        held = self._layers[layer]
        if held is None:
            shape = batch, heads, self.context, head_dim
            held = self._layers[layer] = key.new_empty(shape), value.new_empty(shape)
        if held[0].shape[0] != batch:
            raise ValueError(f"tokens: got a batch of {batch}; accepted is the cache's, {held[0].shape[0]}")
        end = self.length + tokens
        for store, new in zip(held, (key, value)):
            store[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]


class LayerNorm(nn.Module):
    """The next step of the residual stream: a branch's output is added to it, and the sum is normalised."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias = nn.Parameter(torch.zeros(config.width))
        self.eps = config.eps
        self.backend = backend(config)

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(norm of the sum, the sum)``, both ``(B, T, C)``; the norm in the branch's dtype, the sum in the stream's."""
        if branch is None:
            return layer_norm(stream, self.weight, self.bias, self.eps, backend=self.backend), stream
        return add_layer_norm(branch, stream, self.weight, self.bias, self.eps, backend=self.backend)


class Linear(nn.Linear):
    """`nn.Linear` on `gptkernels.linear`."""

    def __init__(self, config: GPTConfig, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.backend = backend(config)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, backend=self.backend)


class SelfAttention(nn.Module):
    """Causal self-attention over the heads of one packed projection, read in place."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.explicit = config.attention_impl == "explicit"
        self.dropout = config.dropout
        self.backend = backend(config)
        self.c_attn = Linear(config, config.width, 3 * config.width)
        self.c_proj = Linear(config, config.width, config.width)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor | None]:
        """``(B, T, C) -> (B, T, C)``, and with explicit attention its weights ``(B, H, T, keys)``."""
        batch, tokens, width = x.shape
        packed = self.c_attn(x).view(batch, tokens, 3, self.n_head, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each a strided view (B, H, T, D)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        weights = None
        dropout_p = self.dropout if self.training else 0.0
        if self.explicit:
            scores = query @ key.transpose(-2, -1)  # (B, H, T, keys)
            weights = softmax(scores, scale=1 / math.sqrt(self.head_dim), causal=True, backend=self.backend)
            out = nn.functional.dropout(weights, dropout_p) @ value
        else:
            out = causal_attention(query, key, value, dropout_p=dropout_p, backend=self.backend)
        merged = out.transpose(1, 2).reshape(batch, tokens, width)  # a view: out lies (B, T, H, D) in memory
        return self.c_proj(merged), weights


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear; the first bias is added in GELU's own pass."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config, config.width, 4 * config.width)
        self.c_proj = Linear(config, 4 * config.width, config.width)
        self.backend = backend(config)

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear(x, self.c_fc.weight, backend=self.backend)
        return self.c_proj(gelu(hidden, self.c_fc.bias, backend=self.backend))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP. What it adds last is left to the next norm to add."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, stream: Tensor, branch: Tensor | None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(stream, branch)``, each ``(B, T, C)``, to the same after this block, and with explicit attention its weights.

        The stream proper is the sum of the two.
        """
        normed, stream = self.ln_1(stream, branch)
        attended, weights = self.attn(normed, cache)  # weights: (B, H, T, keys)
        normed, stream = self.ln_2(stream, self.dropout(attended))
        return stream, self.dropout(self.mlp(normed)), weights
