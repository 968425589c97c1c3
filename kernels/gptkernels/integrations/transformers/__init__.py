"""Hugging Face transformers on this library's kernels.

`accelerate_model` makes a model's attention, norms, activations, rotary embeddings, gated MLPs and loss run on them.

Importing this also registers the attention by itself: ``from_pretrained(..., attn_implementation="gptkernels")`` and
``model.set_attn_implementation("gptkernels")`` then work for models that support "sdpa". transformers does not check that
they do; `accelerate_model` does.

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
from typing import Any

import transformers
from torch import nn

from gptkernels import replace_modules
from gptkernels import swap as _swap

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    from gptkernels.integrations.transformers import modules
    from gptkernels.integrations.transformers.attention import attend
    from gptkernels.integrations.transformers.losses import LOSSES
    from gptkernels.integrations.transformers.masks import make_mask
    from gptkernels.integrations.transformers.switch import NAME, restore_names, switch_attention
except ImportError as error:
    raise ImportError(
        f"gptkernels.integrations.transformers: found transformers {transformers.__version__}; it is tested with 5.17 to "
        f"5.24 ({error})"
    ) from error
if "q_length" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(
        f"gptkernels.integrations.transformers: found transformers {transformers.__version__}, whose masks are made from "
        "cache positions; accepted are versions that make them from lengths (tested with 5.17 to 5.24)"
    )

__all__ = ["accelerate_model"]

log = logging.getLogger(__name__)

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)


def accelerate_model(model: Any) -> Any:
    """Makes a Hugging Face model run on this library's kernels, in place; logits, loss and gradients stay equal up to rounding.

    - Attention: causal, bidirectional, sliding windows, grouped-query heads, padding on either side, caches; dropout in
      training. What the kernels do not support (see `attend`) runs exactly as without them. A part of the model keeps its own
      attention if it does not support "sdpa", does not look its attention up by name, or makes special masks for "sdpa".
    - Norms and activations: see `gptkernels.replace_modules`.
    - Llama and similar models: rotary embeddings, and ``silu(gate) * up`` in one pass. GPT-2: bias and GELU in one pass.
    - The loss that causal and masked language models compute from `labels`, unless the model was given another one.

    A part is only changed if running it shows that it computes the same. What was changed, and what was left and why, is
    logged (`logging`, level INFO). Weights, state dict, generation, saving, copying and pickling work as before.
    `gptkernels.restore_modules` undoes the call exactly; a second call changes nothing.

    The name of the attention stands in the config, which several models may share. `model.config` and the configs in it are
    therefore replaced by copies.

    Args:
        model: a `transformers.PreTrainedModel`, or a module that contains one, such as PEFT's wrappers.

    Returns:
        `model` itself.

    Raises:
        TypeError: a module without a `PreTrainedModel` in it.
    """
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not models:
        raise TypeError(f"model: got {type(model).__name__}; accepted is a transformers.PreTrainedModel")
    report, before = switch_attention(model)
    log.info("%s", report)
    for part in models:
        own_loss = getattr(part, "loss_type", None) in ("ForCausalLM", "ForMaskedLM") and part.loss_function in LOSSES
        if own_loss:
            part.loss_function = LOSSES[part.loss_function]
        if own_loss or part in before:
            _swap.on_restore(part, functools.partial(_restore, configs=before.get(part, [])))
    log.info("%s", replace_modules(model))
    log.info("%s", modules.replace_parts(model))
    return model


def _restore(model: Any, configs: list[tuple[Any, str]]) -> str:
    restore_names(configs)
    if vars(model).get("_loss_function") in LOSSES.values():
        del model._loss_function
    return "attention and loss"
