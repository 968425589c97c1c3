"""What cross_entropy and linear_cross_entropy share: argument checks, row weights, and how a finished gradient is handed on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels import _check

REDUCTIONS = ("mean", "sum", "none")


def validate(name: str, x: Tensor, target: Tensor, reduction: str) -> None:
    """Checks what both losses take; `x` holds the logits, or what they are made from, under the name `name`."""
    _check.floating(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions; accepted is (..., N)")
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: got {getattr(target, 'dtype', type(target).__name__)}; accepted are int64 and int32")
    _check.shape("target", target, tuple(x.shape[:-1]))
    _check.same_device("target", target, name, x)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; accepted are {', '.join(map(repr, REDUCTIONS))}")


def row_weights(target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """What each target's loss counts in the sum or mean, float32: 0 for an ignored one."""
    counted = (target != ignore_index).to(torch.float32)
    return counted / counted.sum() if reduction == "mean" else counted


def reduced(losses: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of `losses`; with no target that counts, a mean's weights are NaN, and so is it (PyTorch's answer)."""
    return (losses * weights).sum()


def is_one(grad_out: Tensor) -> bool:
    """Whether a gradient may pass untouched: where looking costs no wait for a device."""
    return not torch.compiler.is_compiling() and grad_out.device.type == "cpu" and float(grad_out) == 1.0


def keep_gradients(ctx: Any, *gradients: Tensor) -> None:
    """Keeps gradients that forward has finished, beside the saved inputs (``ctx.inputs``).

    In eager mode as a plain attribute that `take_gradients` gives up: autograd may then adopt a buffer as ``.grad``
    without a copy.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*ctx.inputs, *gradients)
        ctx.gradients = None
    else:
        ctx.save_for_backward(*ctx.inputs)
        ctx.gradients = gradients
    ctx.kept = len(gradients)
    del ctx.inputs


def take_gradients(ctx: Any) -> tuple[Tensor, ...] | None:
    """What `keep_gradients` kept; None when an earlier backward (retain_graph) took it: they have to be computed again."""
    saved = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return saved[len(saved) - ctx.kept :]
    gradients, ctx.gradients = ctx.gradients, None
    return gradients
