"""What a model is made of and what it costs, as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gptcore.models import GPT


def describe(model: GPT) -> str:
    """A table for people: parameters and where they are, memory, floating-point operations, and each kernel's backend.

    Memory of training counts float32 weights, gradients and AdamW's two moments, and no activations.
    """
    import gptkernels

    config = model.config
    groups: dict[str, int] = {"token embedding": model.wte.weight.numel()}
    if model.wpe is not None:
        groups["position embedding"] = model.wpe.weight.numel()
    for name, part in (("attention", ".attn."), ("MLP", ".mlp.")):
        groups[name] = sum(p.numel() for full, p in model.named_parameters() if part in full)
    if model.lm_head is not None:
        groups["output layer"] = model.lm_head.weight.numel()
    total = model.num_parameters()
    groups["norms"] = total - sum(groups.values())
    shared = f" over {config.kv_heads} of keys and values" if config.kv_heads != config.n_head else ""
    lines = [
        f"{config.n_layer} layers, width {config.width}, {config.n_head} heads of {config.head_dim}{shared}, MLP {config.hidden} "
        f"({config.activation}), {config.norm}, {config.positions} positions, context {config.context:,}, "
        f"vocabulary {config.vocab_size:,}{'' if config.tied else ', output layer of its own'}",
        "",
        f"{'parameters':<22}{total:>16,}",
        *(f"  {name:<20}{count:>16,}  {count / total:6.1%}" for name, count in groups.items()),
        "",
        f"{'weights':<22}{_size(4 * total):>16}  in fp32, {_size(2 * total)} in bf16",
        f"{'training':<22}{_size(16 * total):>16}  fp32 weights, gradients and AdamW's moments, without activations",
        f"{'key/value cache':<22}{_size(cache_bytes_per_token(model, 2)):>16}  a token in bf16; "
        f"{_size(cache_bytes_per_token(model, 2) * config.context)} for a full context",
        f"{'training':<22}{model.flops((1, config.context)) / config.context / 1e6:>12,.0f} MF  a token, at the full context",
        f"{'generation':<22}{model.flops((1, 1)) / 3e6:>12,.0f} MF  a token, without attention to what came before",
        "",
    ]
    device = next(model.parameters()).device
    for row in gptkernels.report().rows:
        if torch.device(row.device).type == device.type:
            runs = row.auto if config.kernels == "auto" else config.kernels
            lines.append(f"{row.op:<22}{runs:>16}")
    return "\n".join(lines)


def cache_bytes_per_token(model: GPT, itemsize: int) -> int:
    """Bytes of keys and values that a token leaves in the cache, with values of `itemsize` bytes."""
    config = model.config
    return 2 * config.n_layer * config.kv_heads * config.head_dim * itemsize


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
