"""The cross-entropy of a linear layer's output in plain PyTorch, which holds all logits twice."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gptkernels._loss import reference


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy` of ``x @ weight^T + bias``."""
    return reference.cross_entropy(F.linear(x, weight, bias), target, ignore_index, reduction)
