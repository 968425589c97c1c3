"""What cross_entropy and linear_cross_entropy share: checks, row weights, and how a finished gradient is handed on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

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


def row_gradients(target: Tensor, ignore_index: int, reduction: str, grad_out: Tensor) -> Tensor:
    """The gradient of each target's loss, float32, from that of what was returned."""
    return grad_out if reduction == "none" else row_weights(target, ignore_index, reduction) * grad_out


def with_the_loss(x: Tensor, reduction: str) -> bool:
    """Whether forward finishes the gradients but for a factor, or leaves them to backward.

    float16 is left: the rows of a mean weigh so little that their gradients would be rounded to 0 before a loss scale
    reaches them. With "none" every row has a factor of its own.
    """
    return reduction != "none" and x.dtype != torch.float16


def keep(ctx: Any, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...] = ()) -> None:
    """Saves `inputs`, and beside them the `gradients` that forward has finished, if it has.

    In eager mode these are a plain attribute that the first backward takes away: autograd may then adopt a buffer as
    ``.grad`` without a copy. Under torch.compile they are saved tensors, the only ones it knows.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*inputs, *gradients)
    else:
        ctx.save_for_backward(*inputs)
        ctx.gradients = gradients


def take(ctx: Any, inputs: int, grad_out: Tensor) -> tuple[Tensor, ...]:
    """What `keep` kept beside `inputs` inputs, times `grad_out`; nothing where an earlier backward (retain_graph) took it.

    The inputs are not looked at: they may have been changed in place since.
    """
    if torch.compiler.is_compiling():
        return tuple(gradient * grad_out for gradient in ctx.saved_tensors[inputs:])
    # Several at once, by torch.func.vmap or is_grads_batched: no one number to look at, no one buffer to give away.
    if is_batchedtensor(grad_out) or is_legacy_batchedtensor(grad_out):
        return tuple(gradient * grad_out for gradient in ctx.gradients)
    gradients, ctx.gradients = ctx.gradients, ()
    # Almost always a 1, and no pass over the gradients. On a GPU the kernel looks: for the host to look would be to wait
    # for all the work before it.
    if gradients and ctx.backend == "triton":
        from gptkernels._loss.triton import scale_

        for gradient in gradients:
            scale_(gradient, grad_out)
    elif gradients and not (type(grad_out) is Tensor and float(grad_out) == 1.0):  # a fake one has no value
        for gradient in gradients:  # nobody else holds them
            gradient.mul_(grad_out)
    return gradients
