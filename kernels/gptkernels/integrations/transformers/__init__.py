"""Hugging Face transformers on this library's kernels.

Importing this registers the attention: ``from_pretrained(..., attn_implementation="gptkernels")`` and
``model.set_attn_implementation("gptkernels")`` then work, for models that "sdpa" serves: transformers does not ask whether
it does. `accelerate_model` asks, and does the rest: norms, activations, rotary embeddings, gated MLPs and the loss.

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
    from gptkernels.integrations.transformers.switch import NAME, name_as_before, switch_attention
except ImportError as error:
    raise ImportError(
        f"gptkernels.integrations.transformers: found transformers {transformers.__version__}; it is tested with 5.17 to "
        f"5.23 ({error})"
    ) from error
if "q_length" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(
        f"gptkernels.integrations.transformers: found transformers {transformers.__version__}, whose masks are made from "
        "cache positions; accepted are versions that make them from lengths (tested with 5.17 to 5.23)"
    )

__all__ = ["accelerate_model"]

log = logging.getLogger(__name__)

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)


def accelerate_model(model: Any) -> Any:
    """Puts a Hugging Face model on this library's kernels, in place; logits, loss and gradients stay what they are.

    - Attention: causal, bidirectional, sliding windows, grouped-query heads, padding on either side, caches; dropout in
      training. What the kernels cannot do (`attend`) runs exactly as without them. A part that "sdpa" does not serve keeps
      its own attention: one that opts out of it, does not look its attention up by name, or makes other masks for it.
    - Norms and activations: `gptkernels.replace_modules`.
    - Llama and its kin: rotary embeddings, and ``silu(gate) * up`` in one pass. GPT-2: bias and GELU in one pass.
    - The loss that causal and masked language models compute from `labels`, unless the model was given another.

    Every part that is not recognised, by asking it what it computes, is left as it is; what was changed, and what was left
    and why, is logged (`logging`, level INFO). Weights, state dict, generation, saving, copying and pickling are untouched;
    `gptkernels.restore_modules` undoes it, bit for bit. Calling it again changes nothing.

    The config names the attention, and models can share one: `model.config` and those in it become copies of their own.

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
    name_as_before(configs)
    if vars(model).get("_loss_function") in LOSSES.values():
        del model._loss_function
    return "attention and loss"
