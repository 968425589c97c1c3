"""Which keys each query sees: the mask that transformers makes once a forward and carries to every layer's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing


class Visible(NamedTuple):
    """Which keys each query sees, in the terms of `gptkernels.attention`: what our mask function hands our attention.

    Transformers makes a mask once a forward and carries it through the model to every layer's attention. Nothing in it is
    quadratic in the tokens, and nothing is left to be guessed from the layer.
    """

    queries: int
    slots: int
    """Keys there are: of a cache of fixed size all its places."""
    keys: int
    """Keys that hold something: the first of them. The last query's own is the last."""
    is_causal: bool
    window: int | None
    key_mask: Tensor | None
    """``(B, keys)`` bool, True = attend."""

    ndim = 4  # "an attention mask that is ready": transformers asks

    def contiguous(self) -> Visible:
        """Itself: `generate` asks this of every mask."""
        return self

    def dense(self, device: torch.device) -> Tensor:
        """The same as ``(B or 1, 1, queries, slots)`` bool, for what takes only such masks."""
        query = torch.arange(self.queries, device=device)[:, None] + (self.keys - self.queries)
        key = torch.arange(self.slots, device=device)
        visible = key <= query if self.is_causal else (key < self.keys).expand(self.queries, -1)
        if self.window is not None:
            visible = visible & (key > query - self.window)
        if self.key_mask is None:
            return visible[None, None]
        return visible & F.pad(self.key_mask, (0, self.slots - self.keys))[:, None, None]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """Our entry in transformers' `AttentionMaskInterface`; called with lengths, offsets, a rule and the 2D padding mask.

    Returns `Visible` for the rules that our kernels have (causal, causal with a sliding window, bidirectional; padding
    anywhere). For every other rule (packed sequences, chunks, images among text, a model's own) and for the single query of
    a decoding step it returns what the "sdpa" implementation gets: a bool ``(B, 1, queries, keys)`` or None.
    """
    if isinstance(attention_mask, Visible):  # made ahead of the forward by `generate`
        return attention_mask
    # transformers withdraws these permissions from any rule it has modified, and where a model works on the mask itself.
    is_causal = allow_is_causal_skip and mask_function is causal_mask_function
    bidirectional = allow_is_bidirectional_skip and mask_function is bidirectional_mask_function
    window = None
    if allow_is_causal_skip and not is_causal and local_size is not None:
        chunked = getattr(config, "attention_chunk_size", None) is not None
        if not chunked and getattr(config, "sliding_window", None) == local_size:
            is_causal, window = True, local_size
    known = (is_causal or bidirectional) and q_length > 1 and (attention_mask is None or attention_mask.ndim == 2)
    offset: Any = q_offset
    if isinstance(q_offset, Tensor) and known:  # a cache of fixed size counts on the device, for the compiler's sake
        known = not is_tracing(q_offset)
        offset = q_offset.item() if known else q_offset
    keys = kv_length
    if known and is_causal:
        keys = offset + q_length - kv_offset  # the last query's own, and nothing behind it
        known = q_length <= keys <= kv_length
    if not known:
        return sdpa_mask(
            batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask, local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            config=config, **kwargs,
        )  # fmt: skip
    key_mask = None
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        key_mask = padding[:, kv_offset : kv_offset + keys].bool().expand(batch_size, -1)
        if key_mask.device.type == "cpu" and not is_tracing(key_mask) and bool(key_mask.all()):
            key_mask = None  # on a GPU, looking would wait for the device
    return Visible(q_length, kv_length, keys, is_causal, None if window is None or window >= keys else window, key_mask)
