"""Hugging Face transformers on this library's kernels.

Importing this registers the attention: ``from_pretrained(..., attn_implementation="gptkernels")`` and
``model.set_attn_implementation("gptkernels")`` then work. `accelerate_model` does that and the rest: norms, activations,
rotary embeddings, gated MLPs and the loss.

>>> import torch, gptkernels
>>> from transformers import GPT2Config, GPT2LMHeadModel
>>> from gptkernels.integrations.transformers import accelerate_model
>>> model = accelerate_model(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=99)))
>>> model(torch.arange(7)[None]).logits.shape
torch.Size([1, 7, 99])
>>> report = gptkernels.restore_modules(model)  # as it was
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from gptkernels import attention, cross_entropy, gelu, replace_modules, rotary, swiglu
from gptkernels import swap as _swap
from gptkernels.attention.api import MAX_HEAD_DIM

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.activations import SiLUActivation
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )
    from transformers.pytorch_utils import Conv1D
    from transformers.utils.import_utils import is_tracing
    from transformers.utils.output_capturing import _active_collector
except ImportError as error:
    raise ImportError(
        f"gptkernels.integrations.transformers: found transformers {transformers.__version__}; it is tested with 5.18 and "
        f"5.23 ({error})"
    ) from error
if "q_length" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(
        f"gptkernels.integrations.transformers: found transformers {transformers.__version__}, whose masks are made from "
        "cache positions; accepted are versions that make them from lengths (tested with 5.18 and 5.23)"
    )

__all__ = ["accelerate_model"]

NAME = "gptkernels"
log = logging.getLogger(__name__)


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


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Our entry in transformers' `AttentionInterface`: ``(B, H, T, D)`` to ``(B, T, H, D)`` and the weights, if wanted.

    What our kernels do not do goes where it is done exactly: wanted attention weights, capped scores, sinks and position
    biases to the model's own eager attention; masks that are no `Visible`, and sizes beyond the kernels', to PyTorch's.
    """
    visible = _as_visible(module, query, key, attention_mask, is_causal)
    if visible is None and attention_mask is None:  # causal, and more queries than keys: PyTorch aligns at the first
        shape = query.shape[2], key.shape[2]
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    if _wants_weights(kwargs) or any(kwargs.get(name) is not None for name in _SCORES):
        mask = attention_mask if visible is None else visible.dense(query.device)
        return _eager(module, query, key, value, mask, dropout, scaling, kwargs)
    if visible is None or not _fits(query, key, value, scaling) or kwargs.get("cache") is not None:
        if isinstance(attention_mask, Visible):
            attention_mask = attention_mask.dense(query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
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
    return out.transpose(1, 2), None  # (B, T, H, D), as it lies in memory


_SCORES = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Arguments by which a model changes its scores."""


def _as_visible(module: nn.Module, query: Tensor, key: Tensor, mask: Any, is_causal: bool | None) -> Visible | None:
    """What a mask, or none, says for these queries and keys; None for a mask that only says it key by key."""
    queries, slots = query.shape[2], key.shape[2]
    if isinstance(mask, Visible):
        if (mask.queries, mask.slots) != (queries, slots):
            raise ValueError(
                f"attention_mask: made for {mask.queries} queries and {mask.slots} keys; got {queries} and {slots}"
            )
        return mask
    if mask is None:  # by the same convention as for "sdpa": the layer knows, and an empty cache's places lie behind
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
    """Whether the caller of the model asked for attention weights: some models pass it on, for others hooks collect them."""
    collected = (_active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()) or ()
    return bool(kwargs.get("output_attentions")) or "attentions" in collected or "cross_attentions" in collected


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model's own file defines; it takes additive masks."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__}: attention weights, softcap, sinks or a position bias were asked for, which "
            'attn_implementation="gptkernels" leaves to the model\'s own eager attention, and it has none'
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Transformers' loss of a causal language model on `cross_entropy`, without its float32 copy of the logits."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return masked_lm_loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """Transformers' loss of a masked language model on `cross_entropy`, without its float32 copy of the logits."""
    logits = logits.reshape(-1, vocab_size)
    labels = labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return cross_entropy(logits, labels, ignore_index)
    total = cross_entropy(logits, labels, ignore_index, "sum")
    return total / (
        num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    )


LOSSES = {ForCausalLMLoss: causal_lm_loss, ForMaskedLMLoss: masked_lm_loss}


def _hooked(module: nn.Module) -> bool:
    """Whether somebody watches what goes through `module`, which then has to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class SwiGLU:
    """The forward of gated MLPs, ``down_proj(silu(gate_proj(x)) * up_proj(x))``: gate and product in one pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if type(self.act_fn) not in _SILU or _hooked(self.act_fn):
            return super().forward(x)  # type: ignore[misc]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


_SILU = (nn.SiLU, SiLUActivation)


class BiasGELU:
    """The forward of GPT-2's MLP: the first projection's bias is added in GELU's own pass."""

    c_fc: Any
    c_proj: nn.Module
    act: Any
    dropout: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        form = _FORMS.get(_swap.kind_of(self.act))
        if form is None or type(self.c_fc) is not Conv1D or _hooked(self.c_fc) or _hooked(self.act):
            return super().forward(hidden_states)  # type: ignore[misc]
        hidden = torch.matmul(hidden_states, self.c_fc.weight)
        return self.dropout(self.c_proj(gelu(hidden, self.c_fc.bias, form)))


_FORMS: dict[Any, str] = {_swap.TanhGELU: "tanh", _swap.ExactGELU: "none"}


class Rotary:
    """The forward of layers that call their file's ``apply_rotary_pos_emb``: the same code, with ours under that name."""

    _gptkernels_original: type[nn.Module]

    def __init_subclass__(cls) -> None:
        theirs: Any = cls._gptkernels_original.forward
        rotate = _fused_rotary(theirs.__globals__["apply_rotary_pos_emb"])
        # Nothing outside this class changes: the file's own function, and every other model of that file, stay as they are.
        scope = {**theirs.__globals__, "apply_rotary_pos_emb": rotate}
        forward = types.FunctionType(theirs.__code__, scope, theirs.__name__, theirs.__defaults__, theirs.__closure__)
        forward.__kwdefaults__, forward.__doc__ = theirs.__kwdefaults__, theirs.__doc__
        cls.forward = forward


def _fused_rotary(theirs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        head_dim = q.shape[-1]
        # Wider tables make a wider result, unless autocast narrows it again.
        same = cos.dtype == q.dtype == k.dtype
        same |= cos.dtype == torch.float32 and torch.is_autocast_enabled(q.device.type)
        if args or kwargs or not same or cos.ndim != 3 or q.ndim != 4 or not cos.shape[-1] == k.shape[-1] == head_dim:
            return theirs(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos[..., : head_dim // 2], sin[..., : head_dim // 2]  # (B or 1, T, D / 2): the halves are equal
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


def _is_swiglu(module: Any) -> bool:
    if {n for n, _ in module.named_children()} != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    if type(module.act_fn) not in _SILU:
        return False
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (nn.Linear(n, m, bias=False).double() for n, m in ((4, 6), (4, 6), (6, 4)))
    for layer in (gate, up, down):
        layer.weight.data.normal_(generator=generator)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    exact = down(F.silu(gate(x)) * up(x)).detach()
    double = _swap.stand_in(module, gate_proj=gate, up_proj=up, down_proj=down, act_fn=module.act_fn)
    return _swap.agrees(lambda: type(module).forward(double, x), exact, 1e-9)


def _is_gpt2_mlp(module: Any) -> bool:
    if {n for n, _ in module.named_children()} != {"c_fc", "c_proj", "act", "dropout"}:
        return False
    if type(module.c_fc) is not Conv1D or (form := _FORMS.get(_swap.kind_of(module.act))) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    fc, proj = Conv1D(6, 4).double(), Conv1D(4, 6).double()
    for parameter in (*fc.parameters(), *proj.parameters()):
        parameter.data.normal_(generator=generator)
    x = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    exact = proj(F.gelu(fc(x), approximate=form)).detach()
    double = _swap.stand_in(module, c_fc=fc, c_proj=proj, act=module.act, dropout=nn.Identity())
    return _swap.agrees(lambda: type(module).forward(double, x), exact, 1e-9)


def _is_rotary_attention(module: nn.Module) -> bool:
    """Whether the layer rotates by halves: GPT-J's and others' functions of the same name pair neighbours."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or "apply_rotary_pos_emb" not in code.co_names:
        return False
    theirs: Any = forward.__globals__.get("apply_rotary_pos_emb")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 2, 3, 8, generator=generator, dtype=torch.float64)
    cos, sin = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64).repeat(1, 1, 1, 2)

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]

    return _swap.agrees(lambda: torch.stack(theirs(q, k, cos, sin)), torch.stack([turned(q), turned(k)]), 1e-9)


def _halves_are_equal(embedding: nn.Module) -> bool:
    """Whether a rotary embedding gives each angle twice, a half apart: what rotating by halves takes for granted."""
    try:
        device = next(embedding.buffers()).device
        x, positions = torch.zeros(1, 3, 1, device=device), torch.arange(3, device=device)[None]
        with torch.no_grad():  # a copy, for the ones that keep the longest length they have seen
            both = type(embedding).forward(_swap.stand_in(embedding, **dict(embedding.named_buffers())), x, positions)
        return all(torch.equal(*table.chunk(2, dim=-1)) for table in both)
    except Exception:
        return False


def accelerate_model(model: Any) -> Any:
    """Puts a Hugging Face model on this library's kernels, in place; logits, loss and gradients stay what they are.

    - Attention: causal, bidirectional, sliding windows, grouped-query heads, padding on either side, caches; dropout in
      training. What the kernels cannot do (`attend`) runs exactly as without them.
    - Norms and activations: `gptkernels.replace_modules`.
    - Llama and its kin: rotary embeddings, and ``silu(gate) * up`` in one pass. GPT-2: bias and GELU in one pass.
    - The loss that causal and masked language models compute from `labels`, unless the model was given another.

    Every part that is not recognised, by asking it what it computes, is left as it is. Weights, state dict, config,
    generation, saving, copying and pickling are untouched; `gptkernels.restore_modules` undoes it, bit for bit. Calling it
    again changes nothing.

    Args:
        model: a `transformers.PreTrainedModel`, or a module that holds one (PEFT's wrappers).

    Returns:
        `model` itself.

    Raises:
        TypeError: a module without a `PreTrainedModel` in it.
    """
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not models:
        raise TypeError(f"model: got {type(model).__name__}; accepted is a transformers.PreTrainedModel")
    before = [(part, part.config._attn_implementation) for part in models]
    for part in models:  # an outer one sets its inner ones too
        if part.config._attn_implementation != NAME:
            part.set_attn_implementation(NAME)
    for part, attention_before in before:
        own_loss = getattr(part, "loss_type", None) in ("ForCausalLM", "ForMaskedLM") and part.loss_function in LOSSES
        if own_loss:
            part.loss_function = LOSSES[part.loss_function]
        if own_loss or part.config._attn_implementation != attention_before:
            _swap.on_restore(part, functools.partial(_restore, attention_before=attention_before))
    log.info("%s", replace_modules(model))
    turns = all(_halves_are_equal(m) for m in model.modules() if "RotaryEmbedding" in type(m).__name__)
    for module in list(model.modules()):
        if _swap.obstacle(module):
            continue
        if _is_swiglu(module):
            _swap.swap(module, SwiGLU)
        elif _is_gpt2_mlp(module):
            _swap.swap(module, BiasGELU)
        elif turns and _is_rotary_attention(module):
            _swap.swap(module, Rotary)
    return model


def _restore(model: Any, attention_before: str | None) -> str:
    if model.config._attn_implementation == NAME:
        model.config._attn_implementation_internal = attention_before  # this config's alone, not its parts'
    if vars(model).get("_loss_function") in LOSSES.values():
        del model._loss_function
    return "attention and loss"
