"""Cross-entropy in Triton: the launchers; both losses share the kernels, in `_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels._loss.triton import rows_cross_entropy
from gptkernels._triton import contiguous_like


def cross_entropy_forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The losses, float32, of target's shape."""
    losses = contiguous_like(target, torch.float32)
    if target.numel():
        rows_cross_entropy(logits, target.contiguous(), ignore_index, losses)
    return losses


def cross_entropy_backward(
    logits: Tensor, target: Tensor, row_weight: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``(losses, grad_logits)``: the gradient of the losses' sum weighted by `row_weight`, like logits and contiguous."""
    losses = contiguous_like(target, torch.float32)
    grad_logits = contiguous_like(logits)
    if target.numel():
        weights = row_weight.to(torch.float32).contiguous()
        rows_cross_entropy(logits, target.contiguous(), ignore_index, losses, weights, grad_logits)
    return losses, grad_logits
