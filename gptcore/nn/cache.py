"""The key/value cache of generation."""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens seen so far, so that a new token computes only its own.

    One pair of ``(B, kv heads, capacity, D)`` tensors a layer, made at the first append in the dtype that arrives.
    `length` is the number of tokens that every layer holds.

    Args:
        n_layer: layers that store keys and values.
        capacity: tokens it can hold at most.
        padding: ``(B,)`` int64, how many of each sequence's first tokens are padding that nobody looks at.
    """

    def __init__(self, n_layer: int, capacity: int, padding: Tensor | None = None) -> None:
        self.capacity = capacity
        self.padding = padding
        self.length = 0
        self.source: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values that a layer's cross-attention has made of its source, ``(B, H, S, D)`` each, by layer."""
        self.at: Tensor | None = None
        """``(1,)`` int64 on the model's device: where the next token goes, when that must not be a number of the
        host's (a CUDA graph repeats what it was captured with). All `capacity` keys are then handed out, and
        attention is told how many of them count."""
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

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
