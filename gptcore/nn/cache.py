"""The key/value cache of generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens so far: a new token only computes its own.

    Each layer has a pair of ``(B, kv heads, capacity, D)`` tensors, allocated at the first append in the dtype of its input.
    `length` is the number of tokens that every layer holds.

    Args:
        n_layer: layers that store keys and values.
        capacity: the most tokens it can hold.
        padding: ``(B,)`` int64, how many of each sequence's first tokens are padding, which no token attends to.
        shared: how many tokens stand before the padding.
    """

    def __init__(self, n_layer: int, capacity: int, padding: Tensor | None = None, shared: int = 0) -> None:
        self.capacity = capacity
        self.padding = padding
        self.shared = shared
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

    def key_mask(self, end: int) -> Tensor:
        """``(B, end)`` bool for the first `end` keys of a cache with padding, False on the padding."""
        assert self.padding is not None
        at = torch.arange(end, device=self.padding.device)
        return (at < self.shared) | (at >= self.shared + self.padding[:, None])

    def expand(self, rows: Sequence[int], capacity: int, padding: Tensor | None = None) -> KeyValueCache:
        """Returns a new cache that goes on from this one: its row i begins with a copy of row ``rows[i]``.

        Sequences with a common beginning use it: the beginning is computed once.

        Args:
            rows: for each row of the new cache, a row of this one.
            capacity: the most tokens that the new cache can hold.
            padding: ``(len(rows),)`` int64, how many tokens after those of this cache will be padding. None: the padding
                of this cache, if it has any.

        Raises:
            ValueError: a capacity below this cache's length, or padding for a cache that has padding already.
        """
        if capacity < self.length:
            raise ValueError(f"capacity: got {capacity}; accepted are {self.length} (tokens in the cache) and more")
        if padding is not None and self.padding is not None:
            raise ValueError("padding: got it for a cache that has padding already; accepted is None")
        if padding is None:
            padding = None if self.padding is None else self.padding[list(rows)]
            shared = self.shared
        else:
            shared = self.length
        new = KeyValueCache(len(self._layers), capacity, padding, shared)
        new.length = self.length
        for layer, stored in enumerate(self._layers):
            if stored is not None:
                key, value = (_grown(store[:, :, : self.length], rows, capacity) for store in stored)
                new._layers[layer] = key, value
        return new


def _grown(store: Tensor, rows: Sequence[int], capacity: int) -> Tensor:
    """``(B, H, T, D) -> (len(rows), H, capacity, D)``: these rows of `store`, then zeros."""
    _, heads, length, head_dim = store.shape
    grown = store.new_empty(len(rows), heads, capacity, head_dim)
    grown[:, :, :length] = store if store.shape[0] == 1 else store[list(rows)]  # one row is broadcast
    grown[:, :, length:] = 0
    return grown
