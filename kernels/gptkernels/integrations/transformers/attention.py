"""The attention function that transformers calls: our entry in its `AttentionInterface`."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.output_capturing import _active_collector

from gptkernels import attention
from gptkernels.attention.api import MAX_HEAD_DIM
from gptkernels.integrations.transformers.masks import Mask, Visible


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``(B, H, T, D)``: the output ``(B, T, H, D)``, and the attention weights if the caller asked for them.

    The model's own eager attention computes what our kernels do not support: attention weights, capped scores, sinks, position
    biases, and anything else that comes under a keyword unknown to us. PyTorch's SDPA computes attention with other masks
    than `Mask`, or with sizes that the kernels do not take.

    Raises:
        NotImplementedError: a layer passed such a keyword and has no eager attention, or passed it in place of a mask
            that it makes only for "eager" and "sdpa" (the indices of sparse attention).
    """
    mask = attention_mask.at(query, key) if isinstance(attention_mask, Mask) else attention_mask
    visible = mask.visible if isinstance(mask, Mask) else _as_visible(module, query, key, mask, is_causal)
    if visible is None and mask is None:  # causal with more queries than keys: PyTorch aligns the first of each
        shape = query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    special = [name for name, given in kwargs.items() if given is not None and name not in _KNOWN]
    wants_weights = _wants_weights(kwargs)
    if special or wants_weights:
        eager = own_eager(type(module))
        changed = eager is None and any(name in _SCORES for name in special)
        if changed or (special and chooses_by_name(type(module))):
            raise NotImplementedError(
                f"{type(module).__name__}: got {', '.join(special)}, which only its own attention supports; "
                'accepted is its attn_implementation "sdpa" or "eager" (accelerate_model leaves such a model on it)'
            )
        if eager is not None:
            mask = mask if visible is None else visible.dense(query.device)
            if mask is not None and mask.dtype == torch.bool:  # eager attention adds its masks
                mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
            return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if (
        visible is None
        or not _fits(query, key, value, scaling)
        or special
        or wants_weights
        or kwargs.get("cache") is not None
    ):
        if isinstance(mask, Mask):
            mask = mask.visible.dense(query.device)
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=is_causal, **kwargs)
    if visible.keys < visible.slots:
        key, value = key[:, :, : visible.keys], value[:, :, : visible.keys]
    out = attention(
        query,
        key,
        value,
        is_causal=visible.is_causal,
        scale=scaling,
        dropout_p=dropout,
        key_mask=visible.key_mask,
        window=visible.window,
    )
    return out.transpose(1, 2), None  # (B, T, H, D), contiguous


_SCORES = ("softcap", "s_aux", "sinks", "position_bias")
"""Arguments that change the attention scores."""

_KNOWN = frozenset({
    "cache", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "return_dict",
    "seq_idx", "sliding_window", "use_cache",
})  # fmt: skip
"""Arguments that do not change the result beyond what the mask says; a model's forward passes them on to every layer."""


def _once(read: Callable[[type], Any]) -> Callable[[type], Any]:
    """Caches `read`, a function of a class, and makes its result a constant to `torch.compile`, which cannot trace it."""
    cached = functools.cache(read)

    @torch.compiler.assume_constant_result
    def result(layer: type) -> Any:
        return cached(layer)

    return result


def _functions(layer: type) -> Iterator[types.FunctionType]:
    """The functions of a layer's class, then those of its bases."""
    for base in layer.__mro__:
        if base not in (nn.Module, object):
            for value in vars(base).values():
                function = inspect.unwrap(value) if callable(value) or hasattr(value, "__wrapped__") else None
                if isinstance(function, types.FunctionType):
                    yield function


def own_eager(layer: type) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The eager attention, taking additive masks, that a layer's file defines and its code names; None without one."""
    file, _, name = _own_eager_name(layer).rpartition(".")
    return getattr(sys.modules[file], name) if name else None


@_once
def _own_eager_name(layer: type) -> str:
    for function in _functions(layer):
        for name in function.__code__.co_names:
            if name.endswith("eager_attention_forward") and name in function.__globals__:
                return f"{function.__module__}.{name}"
    return ""


@_once
def chooses_by_name(layer: type) -> bool:
    """Whether a layer's code compares the attention's name with "sdpa", and so may compute something else for other names."""
    for function in _functions(layer):
        for step, after in itertools.pairwise(dis.get_instructions(function)):
            compared = after.argval if isinstance(after.argval, (tuple, frozenset)) else (after.argval,)
            if step.argval == "_attn_implementation" and after.opname == "LOAD_CONST" and "sdpa" in compared:
                return True
    return False


def _as_visible(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Visible | None:
    """A dense mask, or the lack of one, as a `Visible`; None if it cannot be expressed so."""
    queries, slots = query.shape[2], key.shape[2]
    if mask is None:  # as for "sdpa": the layer says whether it is causal, and unused cache slots follow the keys
        causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if not causal:
            return Visible(queries, slots, slots, False, None, None)
        return Visible(queries, slots, queries, True, None, None) if slots >= queries else None
    if queries == 1 and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:] == (1, 1, slots):
        return Visible(1, slots, slots, False, None, mask[:, 0, 0].expand(query.shape[0], -1))
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> bool:
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    return (
        head_dim <= MAX_HEAD_DIM
        and key.shape == value.shape
        and key.shape[0] == query.shape[0]
        and key.shape[3] == head_dim
        and heads % kv_heads == 0
        and (scaling is None or scaling > 0.0)
    )


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the model's caller asked for attention weights: by an argument, or by a hook of transformers that collects them."""
    collected = (_active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()) or ()
    return bool(kwargs.get("output_attentions")) or "attentions" in collected or "cross_attentions" in collected
