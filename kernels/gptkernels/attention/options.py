"""Attention's options as one record, passed from the public functions to the kernels' launchers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """How a query, a key and a value attend.

    The fields are the options of the dispatcher's ops, in their order, so that ``*options`` passes them to an op and
    ``Options(*arguments)`` collects them again. A named tuple: making a frozen dataclass takes three times as long, 2 us
    of every call.

    With `cu_queries` and `cu_keys` the batch is packed, ``(1, H, total, D)``; its sequences then have at most `max_queries`
    queries and `max_keys` keys.
    """

    key_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    cu_queries: Tensor | None = None
    cu_keys: Tensor | None = None
    dropout_seed: Tensor | None = None
    max_queries: int = 0
    max_keys: int = 0
    is_causal: bool = False
    window: int | None = None
    scale: float | None = None  # None: 1 / sqrt(head_dim), for the reference; the ops take a number
    dropout_p: float = 0.0

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.key_lengths, self.key_mask, self.cu_queries, self.cu_keys, self.dropout_seed

    def scalars(self) -> tuple[Any, ...]:
        """The other fields: ``Options(*tensors, *scalars)`` restores the record."""
        return self.max_queries, self.max_keys, self.is_causal, self.window, self.scale, self.dropout_p


SCHEMA = (
    "Tensor? key_lengths, Tensor? key_mask, Tensor? cu_queries, Tensor? cu_keys, Tensor? dropout_seed,"
    " SymInt max_queries, SymInt max_keys, bool is_causal, int? window, float scale, float dropout_p"
)
"""The fields of `Options` as the ops declare them."""
