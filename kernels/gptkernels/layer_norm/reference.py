"""Layer normalisation in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, in x's dtype (population variance)."""
    # F.layer_norm needs one dtype on some devices; under autocast, float32 weights meet a bfloat16 x.
    weight = weight if weight is None else weight.to(x.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    # On a GPU autocast widens the result to float32: cast it back.
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``(layer_norm(summed) in x's dtype, summed = x + residual in residual's)``."""
    summed = (x + residual).to(residual.dtype)
    return layer_norm(summed, weight, bias, eps).to(x.dtype), summed
