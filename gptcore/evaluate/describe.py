"""Describes a model for people: its parameters, memory, operations and kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gptcore.models import GPT, Model

_PARTS = {
    "token embedding": ("wte.",),
    "position embedding": ("wpe.",),
    "token types": ("wtype.",),
    "attention": (".attn.",),
    "MLP": (".mlp.",),
    "output layer": ("head.",),
    "classifier's head": ("score.", "pooler.", "classifier."),
}
"""The groups of parameters that are shown -> parts of their names. All other parameters are norms'."""


def describe(model: Model) -> str:
    """Returns a table of a model's parameters, memory, floating-point operations, and the backend of each kernel.

    The memory of training counts float32 weights, gradients and AdamW's two moments, without activations.
    """
    import gptkernels

    config = model.config
    groups = dict.fromkeys(_PARTS, 0)
    for name, parameter in model.named_parameters():
        group = next((group for group, parts in _PARTS.items() if any(part in name for part in parts)), "norms")
        groups[group] = groups.get(group, 0) + parameter.numel()
    total = model.num_parameters()
    lines = [
        model.summary(),
        "",
        f"{'parameters':<22}{total:>16,}",
        *(f"  {group:<20}{count:>16,}  {count / total:6.1%}" for group, count in groups.items() if count),
        "",
        f"{'weights':<22}{_size(4 * total):>16}  in fp32, {_size(2 * total)} in bf16",
        f"{'training':<22}{_size(16 * total):>16}  fp32 weights, gradients and AdamW's moments, without activations",
        f"{'training':<22}{model.flops((1, config.context)) / config.context / 1e6:>12,.0f} MF  a token, at the full context",
    ]
    if hasattr(model, "new_cache"):
        cache = cache_bytes_per_token(model, 2)  # type: ignore[arg-type]
        lines += [
            f"{'key/value cache':<22}{_size(cache):>16}  a token in bf16; {_size(cache * config.context)} for a full context",
            f"{'generation':<22}{model.flops((1, 1)) / 3e6:>12,.0f} MF  a token, without attention to what came before",
        ]
    lines.append("")
    device = next(model.parameters()).device
    for row in gptkernels.report().rows:
        if torch.device(row.device).type == device.type:
            runs = row.auto if config.kernels == "auto" else config.kernels
            lines.append(f"{row.op:<22}{runs:>16}")
    return "\n".join(lines)


def cache_bytes_per_token(model: GPT, itemsize: int) -> int:
    """Bytes that one token takes in the key/value cache, if a value takes `itemsize` bytes."""
    config = model.config
    return 2 * config.n_layer * config.kv_heads * config.head_dim * itemsize


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
