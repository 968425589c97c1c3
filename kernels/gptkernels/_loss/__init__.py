"""What cross_entropy and linear_cross_entropy share: checks, row weights, reductions, and gradients made in forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from gptkernels import _check

REDUCTIONS = ("mean", "sum", "none")


def validate(name: str, x: Tensor, target: Tensor, reduction: str) -> None:
    """Checks the arguments of both losses. `x` is the logits or the linear layer's input; errors call it `name`."""
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
    """Returns the weight of each target's loss in the sum or mean, float32: 0 for an ignored target."""
    counted = (target != ignore_index).to(torch.float32)
    return counted / counted.sum() if reduction == "mean" else counted


def reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Returns the sum or mean of `losses`, which are 0 at ignored targets. As in PyTorch, a mean over no target is NaN.

    Summed in float64: the result is a single number, whose error nothing averages out.
    """
    total = losses.sum(dtype=torch.float64)
    return (total / (target != ignore_index).sum() if reduction == "mean" else total).float()


def row_gradients(target: Tensor, ignore_index: int, reduction: str, grad_out: Tensor) -> Tensor:
    """Returns the gradient of each target's loss, float32, from the gradient of the reduced loss."""
    return grad_out if reduction == "none" else row_weights(target, ignore_index, reduction) * grad_out


def gradient_in_forward(x: Tensor, reduction: str) -> bool:
    """Whether forward computes the gradients, which backward then only scales.

    Not for float16: each row of a mean has so small a weight that its gradient would round to 0 before a loss scale
    multiplies it. Not for "none": each row then has a factor of its own, known only in backward.
    """
    return reduction != "none" and x.dtype != torch.float16


def save(ctx: Any, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...] = ()) -> None:
    """Saves `inputs` for backward, and the `gradients` where forward has computed them.

    In eager mode the gradients are a plain attribute that the first backward removes, so that autograd may adopt a buffer
    as ``.grad`` without a copy. torch.compile supports saved tensors only.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*inputs, *gradients)
    else:
        ctx.save_for_backward(*inputs)
        ctx.gradients = gradients


def saved_gradients(ctx: Any, inputs: int, grad_out: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients that `save` saved after so many `inputs`, times `grad_out`.

    Empty where forward computed none, or an earlier backward (``retain_graph=True``) took them. The saved inputs are not
    accessed: they may have been changed in place since.
    """
    if torch.compiler.is_compiling():
        return tuple(gradient * grad_out for gradient in ctx.saved_tensors[inputs:])
    # torch.func.vmap and is_grads_batched call with several factors at once: the buffers must serve each of them.
    if is_batchedtensor(grad_out) or is_legacy_batchedtensor(grad_out):
        return tuple(gradient * grad_out for gradient in ctx.gradients)
    gradients, ctx.gradients = ctx.gradients, ()
    # The factor is almost always 1, and the gradients are then left as they are. On a GPU the kernel compares: if the host
    # did, it would wait for all the work before.
    if gradients and ctx.backend == "triton":
        from gptkernels._loss.triton import scale_

        for gradient in gradients:
            scale_(gradient, grad_out)
    elif gradients and not (type(grad_out) is Tensor and float(grad_out) == 1.0):  # a fake tensor has no value
        for gradient in gradients:  # in place: nobody else holds them
            gradient.mul_(grad_out)
    return gradients
