"""The masks that transformers makes once a forward and passes to every layer's attention: which keys each query sees."""

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
    """Which keys each query sees, as arguments of `gptkernels.attention`. Its size is linear in the number of tokens."""

    queries: int
    slots: int
    """All keys; with a cache of fixed size, all its slots."""
    keys: int
    """Keys in use, which come first. The last of them belongs to the last query."""
    is_causal: bool
    window: int | None
    key_mask: Tensor | None
    """``(B, keys)`` bool, True = attend."""

    def dense(self, device: torch.device) -> Tensor:
        """The same as a dense mask, ``(B or 1, 1, queries, slots)`` bool, True = attend."""
        query = torch.arange(self.queries, device=device)[:, None] + (self.keys - self.queries)
        key = torch.arange(self.slots, device=device)
        visible = key <= query if self.is_causal else (key < self.keys).expand(self.queries, -1)
        if self.window is not None:
            visible = visible & (key > query - self.window)
        if self.key_mask is None:
            return visible[None, None]
        return visible & F.pad(self.key_mask, (0, self.slots - self.keys))[:, None, None]

    def sliced(self, index: Any) -> Visible | None:
        """The mask of ``mask[index]`` if that only drops first queries and unused slots, ``[:, :, -n:, :slots]``; else None."""
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
    """A `Visible` that other code can use like the ``(B, 1, queries, slots)`` bool mask that "sdpa" would get.

    Some models slice their masks or compute with them. A `Mask` knows its shape, dtype and device; any operation that it
    does not implement turns it into a dense mask, which it remains, for our attention too.

    It has no memory: code that bypasses ``__torch_function__`` sees a tensor on the meta device.
    """

    visible: Visible
    real_device: torch.device
    tensor: Tensor | None
    """The dense mask, once it exists. Other code may have written to it."""

    @staticmethod
    def of(visible: Visible, batch: int, device: torch.device) -> Mask:
        size = (batch, 1, visible.queries, visible.slots)
        empty = torch.empty(size, dtype=torch.bool, device="meta")
        if type(empty) is Tensor:
            mask = empty.as_subclass(Mask)
        else:  # the tensors of a tracer (`torch.export`) have no as_subclass
            mask = Tensor._make_wrapper_subclass(_Traced, size, dtype=torch.bool, device=device)
        mask.visible, mask.real_device, mask.tensor = visible, device, None
        return mask

    def dense(self) -> Tensor:
        """The dense mask, made at the first call."""
        if self.tensor is None:
            self.tensor = self.visible.dense(self.real_device).expand(self.shape)
        return self.tensor

    def at(self, query: Tensor, key: Tensor) -> Tensor | None:
        """The mask for a layer with these queries and keys: this one, a dense one or None, as the "sdpa" implementation gets it.

        None is a plain causal mask or none at all: the layer's own `is_causal` decides which. The dense mask is for a layer
        with other sizes than this mask's: PyTorch broadcasts or refuses it.
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
        if func in _SHAPE_QUERIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        mask = args[0] if args else None
        if isinstance(mask, Mask) and mask.tensor is None:
            if func in _PROPERTY_QUERIES:
                return func(torch.empty(0, dtype=torch.bool, device=mask.real_device), *args[1:], **kwargs)
            if func in _KEEPS_VALUES:
                there = func(torch.empty(0, dtype=torch.bool, device=mask.real_device), *args[1:], **kwargs)
                if there.dtype == torch.bool:
                    return mask if there.device == mask.real_device else mask.moved(there.device)
            elif func is Tensor.__getitem__:
                visible = mask.visible.sliced(args[1])
                if visible is not None:
                    return Mask.of(visible, mask.shape[0], mask.real_device)
        args, kwargs = tree_map_only(Mask, Mask.dense, (args, kwargs))
        return func(*args, **kwargs)

    def moved(self, device: torch.device) -> Mask:
        """The same mask for another device."""
        key_mask = self.visible.key_mask
        visible = self.visible if key_mask is None else self.visible._replace(key_mask=key_mask.to(device))
        return Mask.of(visible, self.shape[0], device)


class _Traced(Mask):
    """A `Mask` for tracers, which bypass ``__torch_function__``."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Mask, Mask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


_SHAPE_QUERIES = (
    *_getters("shape", "ndim", "_base"), Tensor.__len__, Tensor.dim, Tensor.is_contiguous, Tensor.ndimension, Tensor.nelement,
    Tensor.numel, Tensor.size, Tensor.stride,
)  # fmt: skip
"""Functions of the mask's shape, answered without its elements."""

_PROPERTY_QUERIES = (
    *_getters(
        "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_sparse", "layout", "requires_grad"
    ),
    torch.is_complex, torch.is_floating_point, Tensor.get_device, Tensor.is_complex, Tensor.is_floating_point,
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
)  # fmt: skip
"""Functions of the mask's dtype, device and flags, answered by an empty bool tensor on its device."""

_KEEPS_VALUES = (Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.to)
"""Functions that do not change a bool tensor's values."""


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
    """Our entry in transformers' `AttentionMaskInterface`: makes a mask from lengths, offsets, a rule and the 2D padding mask.

    Returns a `Mask` for rules that our kernels support: causal, causal with a sliding window, bidirectional; with padding
    anywhere. In all other cases it returns what the "sdpa" implementation gets, a bool ``(B, 1, queries, keys)`` or None: for
    other rules (packed sequences, chunks, images among text, a model's own), the single query of a decoding step, and
    masks that hide no key from any query.
    """
    # transformers sets these permissions to False for rules that it has modified, and for models that compute with the mask.
    is_causal = allow_is_causal_skip and mask_function is causal_mask_function
    bidirectional = allow_is_bidirectional_skip and mask_function is bidirectional_mask_function
    window = None
    if allow_is_causal_skip and not is_causal and local_size is not None:
        chunked = getattr(config, "attention_chunk_size", None) is not None
        if not chunked and getattr(config, "sliding_window", None) == local_size:
            is_causal, window = True, local_size
    known = (is_causal or bidirectional) and q_length > 1 and (attention_mask is None or attention_mask.ndim == 2)
    offset: Any = q_offset
    if (
        isinstance(q_offset, Tensor) and known
    ):  # a cache of fixed size keeps its length on the device, for torch.compile
        known = not is_tracing(q_offset)
        offset = q_offset.item() if known else q_offset
    keys = kv_length
    if known and is_causal:
        keys = offset + q_length - kv_offset  # up to the last query's own key
        known = q_length <= keys <= kv_length
    key_mask = None
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset) if known else None
    if padding is not None:
        key_mask = padding[:, kv_offset : kv_offset + keys].bool().expand(batch_size, -1)
        if key_mask.device.type == "cpu" and not is_tracing(key_mask) and bool(key_mask.all()):
            key_mask = None  # not on a GPU, where reading the values would wait for the device
    if not known or (bidirectional and key_mask is None):
        return sdpa_mask(
            batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask, local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            config=config, device=device, **kwargs,
        )  # fmt: skip
    window = None if window is None or window >= keys else window
    return Mask.of(Visible(q_length, kv_length, keys, is_causal, window, key_mask), batch_size, torch.device(device))
