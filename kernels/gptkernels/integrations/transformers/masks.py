"""Which keys each query sees: the mask that transformers makes once a forward and carries to every layer's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing


class Visible(NamedTuple):
    """Which keys each query sees, in the terms of `gptkernels.attention`. Nothing in it is quadratic in the tokens."""

    queries: int
    slots: int
    """Keys there are: of a cache of fixed size all its places."""
    keys: int
    """Keys that hold something: the first of them. The last query's own is the last."""
    is_causal: bool
    window: int | None
    key_mask: Tensor | None
    """``(B, keys)`` bool, True = attend."""

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

    def part(self, index: Any) -> Visible | None:
        """What ``mask[index]`` says if it drops but first queries and empty places, ``[:, :, -n:, :slots]``; else None."""
        if not (isinstance(index, tuple) and len(index) == 4 and all(isinstance(i, slice) for i in index)):
            return None
        batch, heads, rows, columns = index
        if any(i.step is not None for i in index) or (batch, heads, columns.start) != (slice(None), slice(None), None):
            return None
        first = rows.start or 0
        queries = self.queries - first if first >= 0 else min(-first, self.queries)
        slots = self.slots if columns.stop is None else min(columns.stop, self.slots)
        if queries < 1 or slots < self.keys or (rows.stop is not None and rows.stop < self.queries):
            return None
        return self._replace(queries=queries, slots=slots)


class Mask(Tensor):
    """A `Visible` that is, to everybody but our attention, the ``(B, 1, queries, slots)`` bool mask that "sdpa" would get.

    Models look into their masks: some slice them, some compute from them. This answers what is asked of its shape, dtype and
    device, and becomes a dense mask, for good and for our attention too, at the first operation that is none of ours.

    There is no memory behind it: code that goes round ``__torch_function__`` finds a tensor on the meta device.
    """

    visible: Visible
    place: torch.device
    tensor: Tensor | None
    """The dense mask, once there is one. Somebody may have written to it."""

    @staticmethod
    def of(visible: Visible, batch: int, device: torch.device) -> Mask:
        size = (batch, 1, visible.queries, visible.slots)
        empty = torch.empty(size, dtype=torch.bool, device="meta")
        if type(empty) is Tensor:
            mask = empty.as_subclass(Mask)
        else:  # a tracer's own tensors (`torch.export`) cannot be made into others
            mask = Tensor._make_wrapper_subclass(_Traced, size, dtype=torch.bool, device=device)
        mask.visible, mask.place, mask.tensor = visible, device, None
        return mask

    def dense(self) -> Tensor:
        """What it becomes when it becomes dense."""
        if self.tensor is None:
            self.tensor = self.visible.dense(self.place).expand(self.shape)
        return self.tensor

    def at(self, query: Tensor, key: Tensor) -> Tensor | None:
        """What it means to a layer with these queries and keys: itself, or what the "sdpa" implementation would get.

        That is nothing where the mask is plainly causal: the layer's own `is_causal` decides then. And where it was made for
        other sizes it is a dense mask, which PyTorch broadcasts or refuses.
        """
        if self.tensor is not None:
            return self.tensor
        queries, slots, keys, is_causal, window, key_mask = self.visible
        batch = query.shape[0] if key_mask is None else key_mask.shape[0]
        fits = (queries, slots, batch) == (query.shape[2], key.shape[2], query.shape[0])
        if window is None and (queries == keys or not is_causal):
            unmasked = key_mask is None or (not fits and not is_tracing(key_mask) and bool(key_mask.all()))
            if unmasked:
                return None
        return self if fits else self.dense()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_ITS_SIZE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        mask = args[0] if args else None
        if isinstance(mask, Mask) and mask.tensor is None:
            if func in _OF_ITS_PLACE:
                return func(torch.empty(0, dtype=torch.bool, device=mask.place), *args[1:], **kwargs)
            if func in _MOVES:
                there = func(torch.empty(0, dtype=torch.bool, device=mask.place), *args[1:], **kwargs)
                if there.dtype == torch.bool:
                    return mask if there.device == mask.place else mask.moved(there.device)
            elif func is Tensor.__getitem__:
                part = mask.visible.part(args[1])
                if part is not None:
                    return Mask.of(part, mask.shape[0], mask.place)
        args, kwargs = tree_map_only(Mask, Mask.dense, (args, kwargs))
        return func(*args, **kwargs)

    def moved(self, device: torch.device) -> Mask:
        key_mask = self.visible.key_mask
        visible = self.visible if key_mask is None else self.visible._replace(key_mask=key_mask.to(device))
        return Mask.of(visible, self.shape[0], device)


class _Traced(Mask):
    """A `Mask` for code that a tracer follows below ``__torch_function__``."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Mask, Mask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


_OF_ITS_SIZE = (
    *_getters("shape", "ndim", "_base"), Tensor.__len__, Tensor.dim, Tensor.is_contiguous, Tensor.ndimension, Tensor.nelement,
    Tensor.numel, Tensor.size, Tensor.stride,
)  # fmt: skip
"""What the mask answers without having elements: the sizes that it was made with."""

_OF_ITS_PLACE = (
    *_getters(
        "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_sparse", "layout", "requires_grad"
    ),
    torch.is_complex, torch.is_floating_point, Tensor.get_device, Tensor.is_complex, Tensor.is_floating_point,
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
)  # fmt: skip
"""What any bool tensor at its place answers."""

_MOVES = (Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.to)
"""What leaves a bool tensor's values as they are."""


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Our entry in transformers' `AttentionMaskInterface`; called with lengths, offsets, a rule and the 2D padding mask.

    Returns a `Mask` for the rules that our kernels have (causal, causal with a sliding window, bidirectional; padding
    anywhere). For every other rule (packed sequences, chunks, images among text, a model's own), for the single query of
    a decoding step and where no query is kept from any key it returns what the "sdpa" implementation gets: a bool
    ``(B, 1, queries, keys)`` or None.
    """
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
    key_mask = None
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset) if known else None
    if padding is not None:
        key_mask = padding[:, kv_offset : kv_offset + keys].bool().expand(batch_size, -1)
        if key_mask.device.type == "cpu" and not is_tracing(key_mask) and bool(key_mask.all()):
            key_mask = None  # on a GPU, looking would wait for the device
    if not known or (bidirectional and key_mask is None):
        return sdpa_mask(
            batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask, local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            config=config, device=device, **kwargs,
        )  # fmt: skip
    window = None if window is None or window >= keys else window
    return Mask.of(Visible(q_length, kv_length, keys, is_causal, window, key_mask), batch_size, torch.device(device))
