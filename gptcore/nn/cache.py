"""The key/value cache of generation."""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens so far: a new token only computes its own.

    Each layer has a pair of ``(B, kv heads, capacity, D)`` tensors, allocated at the first append in the dtype of its input.
    `length` is the number of tokens that every layer holds.

    Args:
        n_layer: layers that store keys and values.
        capacity: the most tokens it can hold.
        padding: ``(B,)`` int64, how many of each sequence's first tokens are padding, which no token attends to.
    """

    def __init__(self, n_layer: int, capacity: int, padding: Tensor | None = None) -> None:
        self.capacity = capacity
        self.padding = padding
        self.length = 0
        self.source: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values that a layer's cross-attention has made of its source, ``(B, H, S, D)`` each, by layer."""
        self.at: Tensor | None = None
        """``(1,)`` int64 on the model's device: the position of the next token, for a CUDA graph, which would repeat a
        position from the host. `append` then returns all `capacity` keys, and attention gets how many of them to use."""
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores ``(B, H, T, D)`` after the tokens so far; returns views of all of them, ``(B, H, length + T, D)``."""
        batch, heads, tokens, head_dim = key.shape
        stored = self._layers[layer]
        if stored is None:
            shape = batch, heads, self.capacity, head_dim
            stored = self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        if stored[0].shape[0] != batch:
            raise ValueError(f"tokens: got a batch of {batch}; accepted is the cache's, {stored[0].shape[0]}")
        if self.at is not None:
            for store, new in zip(stored, (key, value)):
                store.index_copy_(2, self.at, new)
            return stored
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(
                f"tokens: got {tokens} after {self.length}; accepted is up to the cache's capacity, {self.capacity}"
            )
        for store, new in zip(stored, (key, value)):
            store[:, :, self.length : end] = new
        return stored[0][:, :, :end], stored[1][:, :, :end]
