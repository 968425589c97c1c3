"""Cross-entropy in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``log(sum(exp(logits))) - logits[target]`` over the last dimension, in float32 (float64 for float64 logits)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), target.flatten().long(), ignore_index=ignore_index, reduction=reduction
    )
    return flat.view(target.shape) if reduction == "none" else flat
