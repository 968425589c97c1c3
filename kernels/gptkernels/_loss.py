"""What cross_entropy and linear_cross_entropy share: checks, row weights, and how a finished gradient is handed on."""

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
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted is (..., N), N at least 1")
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


def reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The sum or mean of `losses`, in which ignored targets are 0; NaN for the mean of none (PyTorch's answer).

    In float64: of one number every rounding shows.
    """
    total = losses.sum(dtype=torch.float64)
    return (total / (target != ignore_index).sum() if reduction == "mean" else total).float()


def keep(ctx: Any, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> None:
    """Saves `inputs`, and beside them the `gradients` that forward has finished.

    In eager mode these are a plain attribute that the first backward takes away: autograd may then adopt a buffer as
    ``.grad`` without a copy. Under torch.compile they are saved tensors, the only ones it knows.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*inputs, *gradients)
    else:
        ctx.save_for_backward(*inputs)
        ctx.gradients = gradients


def take(ctx: Any, saved: tuple[Tensor, ...], inputs: int, grad_out: Tensor) -> tuple[Tensor, ...] | None:
    """What `keep` kept beside `inputs` inputs, times `grad_out`; None where an earlier backward (retain_graph) took it.

    `saved` is ``ctx.saved_tensors``, which may be read only once under activation checkpointing.
    """
    if len(saved) > inputs:
        return tuple(gradient * grad_out for gradient in saved[inputs:])
    gradients, ctx.gradients = ctx.gradients, None
    # Almost always a 1, and no pass over the gradients. On a GPU the kernel looks: for the host to look would be to wait
    # for all the work before it.
    if gradients is not None and ctx.backend == "triton":
        from gptkernels.cross_entropy.triton import scale_

        for gradient in gradients:
            scale_(gradient, grad_out)
    elif gradients is not None and not (type(grad_out) is Tensor and float(grad_out) == 1.0):  # a fake one has no value
        for gradient in gradients:  # nobody else holds them
            gradient.mul_(grad_out)  # a scalar stays float32: a loss scale need not fit float16
    return gradients
