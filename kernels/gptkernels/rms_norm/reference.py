"""RMS normalisation in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in x's dtype."""
    weight = weight if weight is None else weight.to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``(rms_norm(summed) in x's dtype, summed = x + residual in residual's)``."""
    summed = (x + residual).to(residual.dtype)
    return rms_norm(summed, weight, eps).to(x.dtype), summed
